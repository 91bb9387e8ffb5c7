"""Plain files of a checkpoint beside its weights: configuration, statistics, tokenizers, position of the data.

`config.json` has the policy once, under `policy`; `train` has all other fields of the experiment, or is null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pi0_jax import config_json
from pi0_jax.checkpoint.locate import CheckpointError, read, resolve
from pi0_jax.config import PolicyConfig, TrainConfig, version1
from pi0_jax.errors import UserError

FORMAT_VERSION = 2
"""Version of the folder's layout and of config.json; raised when old readers would misread new checkpoints."""

CODEC = "fast"
"""Folder of the FAST codec among the assets."""


class Assets(NamedTuple):
    """What a policy needs besides weights."""

    policy: PolicyConfig
    norm_stats: dict[str, Any] | None
    """JSON object of `norm_stats.json`; None for weights that belong to no dataset yet."""
    tokenizer: bytes | None
    """SentencePiece model file; None where the user has to bring it."""
    train: TrainConfig | None = None
    """Experiment that made the weights; None for converted ones."""
    robot: dict[str, Any] | None = None
    """JSON object of `robot.json`, with the text of the robot's own file as `source` (`data.robot_json`); None where
    the policy's robot comes with the package."""
    codec: dict[str, bytes] | None = None
    """Files of the FAST codec (`data.fast`); None where actions are not written as tokens of one."""


def load_assets(path: str | Path) -> Assets:
    """Reads the policy's configuration, statistics, tokenizer and codec from a path that `resolve` takes.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: foreign, incomplete or damaged folder, or one of another format version.
    """
    step = resolve(path)
    content = read(step, "assets/config.json")
    policy, train, names = _from_json(content, str(step / "assets" / "config.json"))
    stats = read(step, "assets/norm_stats.json") if "norm_stats.json" in names else None
    tokenizer = read(step, "assets/tokenizer.model", bytes) if "tokenizer.model" in names else None
    robot = read(step, "assets/robot.json") if "robot.json" in names else None
    if robot is not None:
        robot["source"] = read(step, "assets/robot.py", bytes.decode)
    codec = {name: read(step, f"assets/{name}", bytes) for name in names if name.startswith(f"{CODEC}/")}
    codec = {name.removeprefix(f"{CODEC}/"): content for name, content in codec.items()}
    return Assets(policy, stats, tokenizer, train, robot, codec or None)


def write_assets(folder: str | Path, assets: Assets) -> None:
    """Writes the plain files of a checkpoint's `assets/`, for programs that write `params/` themselves."""
    write_files(folder, asset_files(assets))


def write_files(folder: str | Path, files: dict[str, bytes]) -> None:
    """Writes files by their names below a folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def asset_files(assets: Assets) -> dict[str, bytes]:
    """Names and contents of the files in `assets/`."""
    files = {}
    if assets.norm_stats is not None:
        files["norm_stats.json"] = to_json(assets.norm_stats)
    if assets.tokenizer is not None:
        files["tokenizer.model"] = assets.tokenizer
    if assets.robot is not None:
        files["robot.json"] = to_json({key: value for key, value in assets.robot.items() if key != "source"})
        files["robot.py"] = str(assets.robot["source"]).encode()
    files |= {f"{CODEC}/{name}": content for name, content in (assets.codec or {}).items()}
    train = None if assets.train is None else config_json.dump(assets.train)
    if train is not None:
        train.pop("policy")
    policy = config_json.dump(assets.policy)
    config = {"format_version": FORMAT_VERSION, "files": list(files), "policy": policy, "train": train}
    return files | {"config.json": to_json(config)}


def policy_to_json(policy: PolicyConfig) -> dict[str, Any]:
    """A policy's configuration as a JSON object, as other programs' checkpoints keep it beside their own files."""
    return {"format_version": FORMAT_VERSION} | config_json.dump(policy)


def policy_from_json(content: dict[str, Any]) -> PolicyConfig:
    """The inverse of `policy_to_json`; CheckpointError if the object is of another version."""
    version = content.get("format_version", 1)
    policy = {name: value for name, value in content.items() if name != "format_version"}
    content = {"format_version": version, "files": [], "policy": policy, "train": None}
    return _from_json(content, "this policy configuration")[0]


def load_data_state(path: str | Path) -> dict[str, Any]:
    """Reads the state of the data iterator; FileNotFoundError or CheckpointError if there is none, or a damaged one."""
    return read(resolve(path), "data_state/iterator.json")


def to_json(value: Any) -> bytes:
    """A JSON file for people and programs."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _from_json(content: dict[str, Any], name: str) -> tuple[PolicyConfig, TrainConfig | None, list[str]]:
    """Policy, experiment and names of the other files in a config.json of any version that is read."""
    try:
        version, policy, train, files = (content[key] for key in ("format_version", "policy", "train", "files"))
        if version == 1:
            policy, train = version1.upgrade(policy, train)
        elif version != FORMAT_VERSION:
            raise UserError(
                f"it has format version {version}, and this pi0_jax reads 1 and {FORMAT_VERSION}. "
                "Use the version of pi0_jax that wrote it."
            )
        if train is None:
            return config_json.load(policy, PolicyConfig, "config.policy"), None, files
        experiment = config_json.load(train | {"policy": policy}, TrainConfig, "config")
        return experiment.policy, experiment, files
    except (KeyError, TypeError, UserError) as error:
        reason = error if isinstance(error, UserError) else repr(error)
        raise CheckpointError(f"{name} does not fit this version: {reason}") from error
