"""big_vision's PaliGemma as `.npz`: image encoder and language expert, read only."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from pi0_jax.config import PolicyConfig
from pi0_jax.convert.assemble import CAMERAS, claim, finished
from pi0_jax.convert.formats import Format, OpenCheckpoint, Overrides, openpi
from pi0_jax.convert.lazy import LazyArray, LazyArrays, all_finite, entry_by_entry, open_npz
from pi0_jax.errors import UserError


def _detect(path: Path) -> Path | None:
    if path.suffix == ".npz" or ".npz:" in str(path):
        return path
    other = ("params", "_METADATA", "model.safetensors")
    files = list(path.glob("*.npz")) if path.is_dir() and not any((path / name).exists() for name in other) else []
    return files[0] if len(files) == 1 else None


def _open(path: Path, overrides: Overrides) -> OpenCheckpoint:
    name, _, subtree = str(path).partition(".npz:")
    file = Path(name + ".npz" if subtree else name)
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}.")
    tensors = open_npz(file)
    for prefix in [subtree.strip("/") + "/"] if subtree else ["params/", "opt/target/", "params/params/"]:
        if any(name.startswith((f"{prefix}img/", f"{prefix}llm/")) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            break
    if not any(name.startswith("llm/") for name in tensors):
        raise UserError(f"{path} has no `llm/` and `img/` parameters of a PaliGemma; it has {sorted(tensors)[:6]} …")
    tensors = all_finite({f"PaliGemma/{name}": tensor for name, tensor in _stacked(tensors).items()})
    model = dataclasses.replace(openpi.guess_model(tensors), cameras=CAMERAS["pi0"])
    claimed = claim(openpi.rules(model.variant), tensors, model)
    return finished("big_vision", file, PolicyConfig(model=model, robot="none"), claimed, add_expert="pi0")


def _stacked(tensors: LazyArrays) -> LazyArrays:
    """Stacks `encoderblock_<i>` trees, as models without scan are saved, into `encoderblock`."""
    found: LazyArrays = {}
    blocks: dict[str, dict[int, LazyArray]] = {}
    for name, tensor in tensors.items():
        if match := re.search(r"/encoderblock_(\d+)/", name):
            blocks.setdefault(name.replace(match[0], "/encoderblock/"), {})[int(match[1])] = tensor
        else:
            found[name] = tensor
    depth = 1 + max((i for layers in blocks.values() for i in layers), default=-1)
    for name, layers in blocks.items():
        if missing := [i for i in range(depth) if i not in layers]:
            raise UserError(f"missing: {name.replace('/encoderblock/', f'/encoderblock_{missing[0]}/')}")
        found[name] = _stack(layers)
    return found


def _stack(layers: dict[int, LazyArray]) -> LazyArray:
    return entry_by_entry((len(layers), *layers[0].shape), layers[0].dtype, lambda i: layers[i].read(None))


FORMAT = Format("big_vision", "an .npz; its own path where there are several", _detect, _open)
