"""What a path holds, and the JSON files beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pi0_jax import checkpoint

Format = Literal["pi0", "openpi", "openpi-torch", "lerobot", "big_vision"]
RECORD = "conversion.json"
"""Left beside converted weights: what was converted from what, and how it was checked."""

_KNOWN = """What is read:
  pi0            params/ and assets/config.json; a run's folder means its newest step
  openpi         params/ with _METADATA in it; a step's folder, or that of steps
  openpi-torch   model.safetensors
  lerobot        model.safetensors, and a config.json with the policy's type
  big_vision     an .npz; its own path where there are several"""
_UNREAD = {
    "model.safetensors.index.json": "has its weights in several files; save them as one model.safetensors",
    "adapter_model.safetensors": "holds PEFT adapters without their model; merge them in LeRobot, then convert that",
    "pytorch_model.bin": "holds pickled weights, which are not read: they can run code; save them as safetensors",
}


def detect(path: Path) -> tuple[Format, Path]:
    """What a path holds, and the folder (or npz file) in which it is.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: something else; the message says what it looks like, and what is read.
    """
    if path.suffix == ".npz" or ".npz:" in str(path):
        return "big_vision", path
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if (path / "model.safetensors").is_file():
        config = path / "config.json"
        is_lerobot = config.is_file() and "type" in read_json(config)
        return ("lerobot" if is_lerobot else "openpi-torch"), path
    if path.name == "params" and (path / "_METADATA").is_file():
        path = path.parent
    steps = [p for p in path.iterdir() if p.name.isdecimal() and (p / "params").is_dir()] if path.is_dir() else []
    step = max(steps, key=lambda p: int(p.name), default=path)
    if (step / "params" / "_METADATA").is_file() and not (step / "assets" / "config.json").is_file():
        return "openpi", step
    if (path / "_METADATA").is_file():
        return "openpi", path
    if (step / "params").is_dir() and not (step / "assets" / "config.json").is_file():
        raise ValueError(f"{step / 'params'} has no _METADATA, so it is not whole; copy it again.")
    if path.is_dir() and len(found := list(path.glob("*.npz"))) == 1:
        return "big_vision", found[0]
    for name, problem in _UNREAD.items():
        if (path / name).is_file():
            raise ValueError(f"{path} {problem}.")
    if path.exists() and not _may_be_ours(path):
        names = sorted(p.name for p in path.iterdir())[:9] if path.is_dir() else []
        what = f"a folder with {', '.join(names[:8])}{' …' * (len(names) > 8)}" if names else "an empty folder"
        raise ValueError(f"{path} is {what if path.is_dir() else 'a file'}, and no checkpoint. {_KNOWN}")
    return "pi0", checkpoint.resolve(path)


def _may_be_ours(path: Path) -> bool:
    """Whether `checkpoint.resolve` has more to say of a path than that it is not ours."""
    marks = ("checkpoints", "params", "assets/config.json", "meta/info.json")
    in_a_run = "checkpoints" in (path.name, path.parent.name) or "orbax-checkpoint-tmp" in path.name
    return path.is_dir() and (in_a_run or any((path / mark).exists() for mark in marks))


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut short, it is not JSON: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file for people, and programs, to read."""
    path.write_text(json.dumps(content, indent=2) + "\n")
