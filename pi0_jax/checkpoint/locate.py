"""What a path is: a checkpoint of ours, of another program, or something else; and the steps of a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pi0_jax.compat import ORBAX_UNFINISHED
from pi0_jax.errors import UserError

Kind = Literal[
    "pi0", "unfinished", "no step", "incomplete", "dataset", "safetensors", "npz", "pickle", "openpi", "unknown"
]
_FOREIGN: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "safetensors": ("PyTorch weights (openpi-PyTorch or LeRobot)", (".safetensors",)),
    "npz": ("big_vision weights (PaliGemma)", (".npz",)),
    "openpi": ("an openpi checkpoint", ()),
    "pickle": ("pickled PyTorch weights", (".pt", ".pth", ".bin")),
}
"""Kinds of weights of other programs: name for people, and endings of their files."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used: foreign, incomplete, damaged, or of another model. The message says which."""

    found: Found | None = None
    """What the path is, where it is no checkpoint of ours."""


class Found(NamedTuple):
    """What a path holds."""

    kind: Kind
    path: Path
    """Absolute: the step folder of "pi0" and "openpi"; otherwise the path that was given."""

    @property
    def convertible(self) -> bool:
        """Whether these are weights of another program that `convert` reads."""
        return self.kind in _FOREIGN and self.kind != "pickle"

    def describe(self) -> str:
        """One or two sentences for people: what the path is, and the way out where it is no checkpoint of ours."""
        path = self.path
        names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if self.convertible:
            return f"{path} looks like {_FOREIGN[self.kind][0]}. Convert it first: docs/checkpoints.md says how."
        absent = "assets/config.json" if "params" in names else "params"
        inside = ", ".join(names[:8]) + " …" * (len(names) > 8)
        return {
            "pi0": f"{path} is a pi0_jax checkpoint.",
            "unfinished": f"{path} is a save that never finished; use a step folder beside it.",
            "no step": f"{path} has no complete checkpoint yet.",
            "incomplete": f"{path} is incomplete: {absent} is missing. {previous_step(path)}",
            "pickle": f"{path} holds pickled PyTorch weights, which nobody should load because they can run code; "
            "save them as safetensors.",
            "dataset": f"{path} is a data set, not a checkpoint.",
            "unknown": f"{path} is not a pi0_jax checkpoint (params/ and assets/config.json); "
            + (f"it has: {inside or 'nothing'}." if path.is_dir() else "it is a file."),
        }[self.kind]


def identify(path: str | Path) -> Found:
    """Looks at the names of files to say what a path is; reads nothing.

    Of a run or a folder of steps, its newest step counts. FileNotFoundError, with what is there instead, if there is no
    such path.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        nearest = next(p for p in path.parents if p.exists())
        inside = ", ".join(sorted(p.name for p in nearest.iterdir())[:8]) if nearest.is_dir() else "a file"
        raise FileNotFoundError(f"no checkpoint at {path}: it does not exist. {nearest} has: {inside or 'nothing'}")
    if path.name == "params" and (path / "_METADATA").is_file():
        path = path.parent
    numbers = ((folder, _step_numbers(folder)) for folder in (path / "checkpoints", path))
    step = next((folder / str(found[-1]) for folder, found in numbers if found), path)
    if is_complete(step):
        return Found("pi0", step)
    if ORBAX_UNFINISHED in step.name:
        return Found("unfinished", step)
    of_a_run = step.parent.name == "checkpoints" and step.name.isdecimal()
    if (step / "params" / "_METADATA").is_file() and not (of_a_run or (step / "digests.json").is_file()):
        return Found("openpi", step)
    if of_a_run:
        return Found("incomplete", step)
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        return Found("no step", path)
    if (path / "meta" / "info.json").is_file():
        return Found("dataset", path)
    if (path / "_METADATA").is_file():
        return Found("openpi", path)
    endings = {p.suffix for p in (path.iterdir() if path.is_dir() else (path,))}
    for kind, (_, own) in _FOREIGN.items():
        if endings.intersection(own):
            return Found(kind, path)
    return Found("unknown", path)


def run_folder(path: Path) -> Path:
    """The run that a path belongs to, where it names one checkpoint of it."""
    return path.parents[1] if path.parent.name == "checkpoints" else path


def resolve(path: str | Path) -> Path:
    """The step folder that `path` means: that folder, or of a run folder or its `checkpoints` folder the newest.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: something else, or an incomplete checkpoint; the message says what it looks like.
    """
    found = identify(path)
    if found.kind == "pi0":
        return found.path
    error = CheckpointError(found.describe())
    error.found = found
    raise error


def is_complete(step: Path) -> bool:
    """Whether a folder has what a policy needs."""
    return (step / "assets" / "config.json").is_file() and (step / "params").is_dir()


def steps(run_dir: str | Path) -> list[int]:
    """Numbers of the complete checkpoints of a run folder, ascending."""
    return _step_numbers(Path(run_dir).expanduser() / "checkpoints")


def latest_step(folder: str | Path) -> int | None:
    """Number of the newest complete checkpoint of a run folder or `checkpoints` folder; None if there is none."""
    folder = Path(folder).expanduser()
    return max(_step_numbers(folder / "checkpoints") + _step_numbers(folder), default=None)


def previous_step(step: Path) -> str:
    """A sentence that names the checkpoint to fall back to from a step folder."""
    older = [s for s in _step_numbers(step.parent) if step.name.isdecimal() and s < int(step.name)]
    return f"The checkpoint before it is {step.parent / str(older[-1])}." if older else "There is none before it."


def read(step: Path, name: str, decode: Callable[[bytes], Any] = json.loads) -> Any:
    """Content of a file of a step folder; raises CheckpointError where it is missing or damaged."""
    try:
        return decode((step / name).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{step} is damaged or incomplete ({step / name}): {error}. {previous_step(step)}"
        ) from error


def set_aside(step: str | Path) -> Path:
    """Renames a damaged step folder, so that nothing takes it for a checkpoint, and returns its new path."""
    folder = Path(step)
    names = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in itertools.count())
    return folder.rename(next(path for path in names if not path.exists()))


def _step_numbers(folder: Path) -> list[int]:
    """Numbers of the step folders in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())
