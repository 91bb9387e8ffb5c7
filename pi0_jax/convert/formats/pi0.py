"""Our own folders: `params/` and `assets/`. Any head: the network itself says which parameters there are."""

from __future__ import annotations

from pathlib import Path

from pi0_jax import checkpoint
from pi0_jax.convert.formats import Format, OpenCheckpoint, Overrides
from pi0_jax.convert.lazy import all_finite
from pi0_jax.convert.orbax_format import open_orbax, write_orbax
from pi0_jax.convert.parameters import parameters
from pi0_jax.convert.rules import Rule, bind, to_ours


def _detect(path: Path) -> Path | None:
    """The step folder; raises CheckpointError over a folder that is ours and incomplete, and says what is wrong."""
    found = checkpoint.identify(path)
    return None if found.convertible or found.kind == "unknown" else checkpoint.resolve(path)


def _open(folder: Path, overrides: Overrides) -> OpenCheckpoint:
    assets = checkpoint.load_assets(folder)
    wanted = parameters(assets.policy.model, assets.policy.objective)
    tensors = all_finite(open_orbax(folder / "params"))
    rules, _ = bind([Rule(path, path) for path in wanted], wanted, tensors)
    step = int(folder.name) if folder.name.isdecimal() else None
    ours = to_ours(rules, wanted, tensors)
    found = OpenCheckpoint("pi0", folder, assets.policy, ours, assets.norm_stats, assets.tokenizer, assets.train, step)
    return found._replace(robot=assets.robot, codec=assets.codec)


def _write(opened: OpenCheckpoint, folder: Path, asset_id: str) -> None:
    write_orbax(folder / "params", opened.tensors)
    (folder / "assets").mkdir()
    assets = checkpoint.Assets(opened.policy, opened.norm_stats, opened.tokenizer, opened.train, opened.robot)
    assets = assets._replace(codec=opened.codec)
    checkpoint.write_assets(folder / "assets", assets)


FORMAT = Format("pi0", "params/ and assets/config.json; a run's folder means its newest step", _detect, _open, _write)
