"""One conversion: open, change, write beside, read back and compare, record, rename."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax import checkpoint
from pi0_jax.atomic import written
from pi0_jax.compat import tensorstore_errno
from pi0_jax.config import ModelConfig
from pi0_jax.convert import card, change
from pi0_jax.convert.assemble import PROMPT_LENGTH
from pi0_jax.convert.files import RECORD, read_json, write_json
from pi0_jax.convert.formats import OpenCheckpoint, Overrides, detect, formats, open_checkpoint, write_checkpoint
from pi0_jax.convert.lazy import LazyArray, pieces
from pi0_jax.convert.remote import is_remote
from pi0_jax.convert.verify import agree
from pi0_jax.errors import UserError

_log = logging.getLogger(__name__)


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "pi0",
    *,
    overrides: Overrides = Overrides(),
    dtype: change.Dtype | None = None,
    merge_lora: bool = False,
    model: ModelConfig = ModelConfig(),
    verify: bool = True,
    edited: bool = False,
    verify_with: str | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    license: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Converts a checkpoint and checks the result. Returns the record that lies in the target as `conversion.json`.

    The arguments are those of `pi0 convert`, which `commands.Convert` documents. The target appears when everything is
    written and checked, never half.

    Args:
        source: a checkpoint of any format (`formats.open_checkpoint`).
        model: action expert, action dimension, horizon and prompt length for a backbone without action expert.
        verify: read the target back and compare every tensor, bit for bit; and compare a source that a conversion of
            ours wrote with the hashes in its `conversion.json`, unless it was `edited` on purpose since.
        verify_with: also compare actions (`agree.agreement`). Beyond `tolerance`, it is recorded with the first
            layer that differs, and a warning; the target is written all the same.
        license: of the weights, as the hub names it; None: what comes with them (`card.find_license`).

    Raises:
        FileNotFoundError: no source.
        FileExistsError: the target is there; or it is to be replaced, and is no checkpoint.
        OSError: the disk is full; nothing is left behind.
        UserError: the source is damaged, incomplete or not what its `conversion.json` says, lacks something that has
            to be given, or does not fit the format.
    """
    started = time.monotonic()
    target = Path(target).expanduser().absolute()
    _check_target(target, overwrite)
    opened = open_checkpoint(source, overrides, offline)
    result, notes = _changed(opened, overrides, dtype, merge_lora, model)
    if to != "pi0" and (less := change.without_table(result)) is not result:
        result = less
        notes.append(f"{to} has no action tokens of a table of their own: table, head and codec are left out")
    notes = [*opened.warnings, *notes, *formats()[to].lost(result)]
    license = license or card.find_license(opened)
    if formats()[to].card and license is None:
        notes.append(f"nothing says under which licence the weights are; --license writes it into {card.CARD}")
    if verify_with is not None:
        if formats()[to].partial:
            raise UserError(f"--verify-with runs whole policies, and {to} holds adapters; compare what they merge to.")
        agree.check_comparable(opened, result, to, verify_with)
    for note in notes:
        _log.warning("%s", note)
    record: dict[str, Any] = _record(opened, result, to, notes) | {"license": license}
    if is_remote(source):
        record["source"]["url"] = str(source)

    with _full_disk_explained(target, result), written(target, replace_folder=True) as temporary:
        write_checkpoint(result, temporary, to, overrides.asset_id)
        if formats()[to].card:
            (temporary / card.CARD).write_text(
                card.model_card(result, target.name, license, adapters=formats()[to].partial)
            )
        write_json(temporary / RECORD, record)
        if verify:
            _verify(opened, result, temporary, edited, record)
        if verify_with is not None:
            record["actions"] = agree.agreement(opened, open_checkpoint(temporary), verify_with, tolerance)
            if not record["actions"]["agree"]:
                notes.append(disagreement(record["actions"]))
                _log.warning("%s", notes[-1])
        record["seconds"] = round(time.monotonic() - started, 1)
        write_json(temporary / RECORD, record)
    return record


def disagreement(actions: dict[str, Any]) -> str:
    """What a record's `actions` say where the two do not agree."""
    return (
        f"actions differ by {actions['largest_difference']:.3g}, more than {actions['tolerance']:g}; source and result "
        f"diverge at {actions['diverges_at']}"
    )


def digest(path: str, tensor: LazyArray) -> str:
    """SHA-256 of one of our parameters: its path, dtype, shape and numbers."""
    found = hashlib.sha256(f"{path} {tensor.dtype} {tensor.shape}\n".encode())
    for _, piece in pieces(tensor):
        found.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def digest_of_all(digests: Mapping[str, str]) -> str:
    """SHA-256 of weights in our layout, from `digest` by path: the same whatever the format they are stored in."""
    return hashlib.sha256("".join(f"{path} {digests[path]}\n" for path in sorted(digests)).encode()).hexdigest()


def _changed(
    opened: OpenCheckpoint, overrides: Overrides, dtype: change.Dtype | None, merge_lora: bool, model: ModelConfig
) -> tuple[OpenCheckpoint, list[str]]:
    """The checkpoint with everything that shall become different, and notes about it."""
    result, notes = opened, []
    before = opened.policy.model.variant
    variant = overrides.variant or opened.add_expert
    if before == "pi0_fast" and variant is not None:
        wanted = {
            "action_dim": overrides.action_dim,
            "action_horizon": overrides.horizon,
            "prompt_length": overrides.prompt_length or PROMPT_LENGTH[variant],
        }
        model = dataclasses.replace(model, **{name: value for name, value in wanted.items() if value is not None})
        result = change.add_action_expert(result, variant, model)
        notes.append("the action expert and its projections are fresh: random weights, to be trained")
    elif overrides.variant not in (None, before):
        raise UserError(
            f"{opened.path} is a {before}, which does not turn into a {overrides.variant}; --variant is for backbones "
            "without an action expert."
        )
    if merge_lora:
        result = change.merge_lora(result)
    result = change.grow(result, overrides)
    if dtype is not None:
        result, loses = change.cast(result, dtype)
        if loses:
            notes.append(f"--dtype {dtype} rounds the weights: precision is lost")
    return result, notes


def _check_target(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError where something is there that is not to be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} is there already; choose another target, or replace it with --overwrite.")
    if target.is_dir() and not any(target.iterdir()):
        return
    try:
        replaceable = target.is_dir() and detect(target)[1] == target
    except (ValueError, OSError):
        replaceable = False
    if not replaceable:
        raise FileExistsError(
            f"--overwrite replaces a checkpoint's folder, and {target} is something else, or holds more than one. "
            "It is left as it is; choose another target."
        )


@contextlib.contextmanager
def _full_disk_explained(target: Path, result: OpenCheckpoint) -> Iterator[None]:
    """Says how much is needed where there is no room, in whichever way the library that writes says so."""
    try:
        yield
    except (OSError, ValueError) as error:
        number = tensorstore_errno(error) or getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        needed = sum(tensor.nbytes for tensor in result.tensors.values())
        raise OSError(
            number,
            f"could not write {target}: {os.strerror(number)}. It takes up to {needed / 1e9:.3g} GB; nothing of it was "
            "left there.",
        ) from error


def _verify(opened: OpenCheckpoint, result: OpenCheckpoint, folder: Path, edited: bool, record: dict[str, Any]) -> None:
    """Checks all of the source and of what was written, puts what was found into the record, or raises UserError."""
    if opened.format == "pi0" and not edited:
        checkpoint.verify(opened.path, only=("params", "assets"))
    partial = formats()[record["format"]].partial
    found = _digests(result.tensors) if partial else _read_back(result, folder)
    unchanged = result.tensors == opened.tensors
    before = found if unchanged else _digests(opened.tensors)
    if not edited:
        _check_recorded(opened, before)
    for tensor in opened.dropped.values():
        for _ in pieces(tensor):
            pass  # reading finds numbers that are not finite
    record["verified"] = {"tensors": len(found), "parameters": _count(result), "largest_difference": 0.0}
    record["source"]["sha256"], record["weights_sha256"] = digest_of_all(before), digest_of_all(found)
    record["leaves_sha256"] = None if partial else found  # part of them is elsewhere


def _digests(tensors: Mapping[str, LazyArray]) -> dict[str, str]:
    return {path: digest(path, tensor) for path, tensor in tensors.items()}


def _read_back(result: OpenCheckpoint, folder: Path) -> dict[str, str]:
    """Reads the written checkpoint back and returns the hashes; a difference, our bug or the disk's, is a UserError."""
    written = open_checkpoint(folder)
    if written.policy.model != result.policy.model:
        raise UserError(f"verification failed: wrote {result.policy.model}, read back {written.policy.model}")
    for name in ("norm_stats", "tokenizer", "codec"):
        if getattr(written, name) != getattr(result, name):
            raise UserError(f"verification failed: {name} was read back differently.")
    digests = {}
    for path, ours in result.tensors.items():
        theirs = written.tensors[path]
        digests[path] = digest(path, ours)
        if digests[path] != digest(path, theirs):
            kinds = f"{ours.dtype}{ours.shape}, {theirs.dtype}{theirs.shape}"
            raise UserError(f"verification failed at {path}: it was read back with other bits ({kinds}).")
    return digests


def _check_recorded(opened: OpenCheckpoint, found: Mapping[str, str]) -> None:
    """Raises UserError that names parameters which changed since a conversion of ours wrote their hashes."""
    path = opened.path / RECORD
    recorded = read_json(path).get("leaves_sha256") if path.is_file() else None
    if not recorded:
        return
    changed = [name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)]
    if not changed:
        return
    shown = [name + (f" ({opened.names[name]})" if name in opened.names else "") for name in changed[:40]]
    listed = "\n  ".join(shown) + (f"\n  and {len(changed) - 40} more" if len(changed) > 40 else "")
    raise UserError(
        f"{len(changed)} of {len(found)} parameters are not what {path} says was written here. If they were changed on "
        "purpose, by training in this folder for instance, go on with --edited; else the folder is damaged:\n  "
        f"{listed}"
    )


def _record(opened: OpenCheckpoint, result: OpenCheckpoint, to: str, notes: list[str]) -> dict[str, Any]:
    packages = ("pi0_jax", "numpy", "jax", "orbax-checkpoint", "tensorstore")
    dtypes = sorted({str(tensor.dtype) for tensor in result.tensors.values()})
    return {
        "source": {"format": opened.format, "name": opened.path.name, "step": opened.step, "sha256": None},
        "format": to,
        "weights_sha256": None,
        "leaves_sha256": None,
        "verified": None,
        "actions": None,
        "parameters": _count(result),
        "dtypes": dtypes,
        "dropped": list(opened.dropped),
        "notes": notes,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "policy": checkpoint.policy_to_json(result.policy),
    }


def _count(opened: OpenCheckpoint) -> int:
    """Number of parameters."""
    return sum(tensor.size for tensor in opened.tensors.values())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
