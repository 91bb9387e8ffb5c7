"""Checkpoint formats: one module per format in this folder, found by listing it.

A module sets `FORMAT`, which says how a folder is recognised, opened as our parameters and written from them; nothing
else has to know of it. Opening reads names, shapes and small files; tensors are read when asked. What a format cannot
say (horizon, cameras, heads) comes from `Overrides`, from the `conversion.json` that an earlier conversion left beside
the weights, or from the error that asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from flax.traverse_util import unflatten_dict

from pi0_jax.config import PolicyConfig, TrainConfig
from pi0_jax.convert import remote
from pi0_jax.convert.lazy import LazyArray, LazyArrays, read_all
from pi0_jax.convert.verify import Runner
from pi0_jax.data.fast import FastCodec
from pi0_jax.data.robot_json import robot_to_json
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Hints:
    """Architecture hints for checkpoints whose tensors are ambiguous; the error asks for them."""

    num_heads: int | None = None
    """Query heads of the experts (PyTorch, of other sizes than the released ones)."""
    num_kv_heads: int | None = None
    """Key/value heads of the experts (likewise)."""
    vision_heads: int | None = None
    """Attention heads of the image encoder (likewise)."""
    asset_id: str | None = None
    """Which of several norm_stats.json under openpi's assets/ (read), or under which name (written)."""
    base: str | None = None
    """Weights that LoRA adapters are for, any format or URL: peft's folders are read with them, and --to peft writes
    what differs from them. By default those on record."""


@dataclasses.dataclass(frozen=True)
class Overrides(Hints):
    """Overrides for metadata that the checkpoint lacks, or that shall change. None: as the checkpoint has it."""

    action_dim: int | None = None
    """Width of state and action vectors. Above the source's: new rows are zero, old inputs give the old outputs."""
    horizon: int | None = None
    """Actions per chunk."""
    cameras: tuple[str, ...] | None = None
    """Cameras in token order."""
    prompt_length: int | None = None
    """Tokens of the prompt."""
    variant: Literal["pi0", "pi05"] | None = None
    """Give a backbone without action expert (PaliGemma, π0-FAST) a fresh one of this variant."""
    lora_scale: float | None = None
    """Factor of attention's adapters, alpha / rank."""
    robot: str | None = None
    """Name of the robot in `pi0_jax.data.robots`, or the Python file of one."""
    state_in_prompt: bool | None = None
    """False for a π0.5 that does not see the state, which no tensor shows: openpi's `pi05_libero`
    (discrete_state_input=False)."""
    tokenizer: str | None = None
    """SentencePiece model to copy into the result, PaliGemma's for released weights."""
    codec: str | None = None
    """Folder of the FAST codec to copy into the result, physical-intelligence/fast for released π0-FAST weights."""


class OpenCheckpoint(NamedTuple):
    """An opened checkpoint: our parameters, unread, and all that goes with them."""

    format: str
    path: Path
    policy: PolicyConfig
    tensors: LazyArrays
    """Our parameters by path."""
    norm_stats: dict[str, Any] | None = None
    """The JSON object of `norm_stats.json`."""
    tokenizer: bytes | None = None
    train: TrainConfig | None = None
    step: int | None = None
    dropped: Mapping[str, LazyArray] = MappingProxyType({})
    """The source's tensors that are not needed, such as the action expert's unused head."""
    warnings: tuple[str, ...] = ()
    add_expert: Literal["pi0", "pi05"] | None = None
    """Variant that a backbone without action expert gets one of, unless another is asked for; None: none is added."""
    base: tuple[str, Path] | None = None
    """The weights that adapters are for: as they were named, and where they are on this machine."""
    names: Mapping[str, str] = MappingProxyType({})
    """Path to what the source calls its tensors, `*` for the layers, where it calls them otherwise."""
    robot: dict[str, Any] | None = None
    """What a checkpoint keeps of a robot that a file describes (`data.robot_json`)."""
    codec: dict[str, bytes] | None = None
    """Files of the FAST codec of action tokens."""


class Format(NamedTuple):
    """A checkpoint format."""

    name: str
    """As `--to` and messages have it."""
    contents: str
    """How a folder of it is recognised, for people."""
    detect: Callable[[Path], Path | None]
    """The folder or file in which a path has a checkpoint of this format; None: it has none. May raise UserError, over
    one that is incomplete."""
    open: Callable[[Path, Overrides], OpenCheckpoint]
    """Opens what `detect` found."""
    write: Callable[[OpenCheckpoint, Path, str], None] | None = None
    """Writes into an empty folder, statistics under an asset id; None: the format is read only."""
    lost: Callable[[OpenCheckpoint], list[str]] = lambda opened: []
    """What the format has no place for, beside the weights: a sentence each."""
    partial: bool = False
    """Whether a folder holds part of the weights alone; writing it compares what was written."""
    card: bool = False
    """Whether folders of it are for the Hugging Face hub, and get a model card."""
    runner: Runner | None = None
    """Runs a folder in the framework that the format is from (`--verify-with`); None: it runs here alone."""


@functools.cache
def formats() -> Mapping[str, Format]:
    """All formats by name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in modules]
    return MappingProxyType({format.name: format for format in found})


def writable() -> tuple[str, ...]:
    """Names of the formats that can be written, ours first."""
    return tuple(sorted((f.name for f in formats().values() if f.write), key=lambda name: (name != "pi0", name)))


_UNREAD = {
    "model.safetensors.index.json": "has its weights in several files; save them as one model.safetensors",
    "adapter_model.safetensors": "holds PEFT adapters without their adapter_config.json; copy it too",
}


def detect(path: Path) -> tuple[Format, Path]:
    """The format of what a path holds, and the folder (or npz file) in which it is.

    Raises:
        FileNotFoundError: there is nothing.
        UserError: something else; the message says what it looks like, and what is read.
    """
    for format in formats().values():
        if (found := format.detect(path)) is not None:
            return format, found
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}.")
    for name, problem in _UNREAD.items():
        if (path / name).is_file():
            raise UserError(f"{path} {problem}.")
    names = sorted(p.name for p in path.iterdir())[:9] if path.is_dir() else []
    what = f"a folder with {', '.join(names[:8])}{' …' * (len(names) > 8)}" if names else "an empty folder"
    known = "\n".join(f"  {format.name:<14} {format.contents}" for format in formats().values())
    raise UserError(f"{path} is {what if path.is_dir() else 'a file'}, and no checkpoint. What is read:\n{known}")


def open_checkpoint(path: str | Path, overrides: Overrides = Overrides(), offline: bool = False) -> OpenCheckpoint:
    """Opens a checkpoint of any format.

    Args:
        path: folder (of a run, the newest step is taken), `.safetensors`, or `.npz` with `:subtree` if wanted; or a URL
            of one, which is copied to the cache first (`remote.fetch`).
        overrides: what the checkpoint does not say.
        offline: URLs have to be in the cache; no connection is opened.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UserError: not a checkpoint, tensors that do not fit one another, sizes that have to be given, or no such robot,
            tokenizer or codec; reading a tensor raises it too, where there are numbers that are not finite.
    """
    if remote.is_remote(path):
        path = remote.fetch(str(path), offline)
    format, folder = detect(Path(path).expanduser().absolute())
    base = None
    if overrides.base is not None:
        local = remote.fetch(overrides.base, offline) if remote.is_remote(overrides.base) else Path(overrides.base)
        base, overrides = (overrides.base, local), dataclasses.replace(overrides, base=str(local))
    opened = format.open(folder, overrides)._replace(base=base)
    if overrides.tokenizer is not None:
        opened = opened._replace(tokenizer=Tokenizer.from_file(overrides.tokenizer).model)
    if overrides.codec is not None:
        opened = opened._replace(codec=FastCodec.load(overrides.codec).files())
    if overrides.robot is not None:
        policy = dataclasses.replace(opened.policy, robot=overrides.robot)
        opened = opened._replace(policy=policy, robot=robot_to_json(overrides.robot))
    if overrides.state_in_prompt is not None:
        changed = dataclasses.replace(opened.policy, state_in_prompt=overrides.state_in_prompt)
        opened = opened._replace(policy=changed)
    return opened


def write_checkpoint(opened: OpenCheckpoint, folder: Path, to: str, asset_id: str | None = None) -> None:
    """Writes a checkpoint into a new folder; UserError if the format cannot hold it, or is only read."""
    write = formats()[to].write
    if write is None:
        raise UserError(f"{to} can be read and not written; the formats to write are {', '.join(writable())}.")
    folder.mkdir(parents=True)
    write(opened, folder, asset_id or (opened.robot or {}).get("name", opened.policy.robot))


def params_of(opened: OpenCheckpoint) -> dict[str, Any]:
    """Reads everything into memory, as the tree that the network takes; numpy, in the stored dtypes."""
    return unflatten_dict(read_all(opened.tensors), sep="/")
