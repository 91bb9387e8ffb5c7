"""Trees of arrays of a checkpoint, read into any sharding, or refused with all that differs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pi0_jax.checkpoint.digests import require_files
from pi0_jax.checkpoint.locate import CheckpointError, previous_step, resolve


def restore_params(path: str | Path, like: Any = None, *, dtype: Any = None, partial: bool = False) -> Any:
    """Reads the weights to run, a tree of `jax.Array`s.

    Args:
        path: anything that `resolve` takes.
        like: tree of arrays or `jax.ShapeDtypeStruct`s that the weights have to match; its dtypes are used.
            Leaves without a sharding go to the first device.
        dtype: dtype to cast to while reading; None: that of `like`, or else the stored one.
        partial: `like` is a subtree of the weights; the others are not read.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: foreign, incomplete or damaged folder, or weights unlike `like`.
    """
    folder = resolve(path) / "params"
    stored = _stored_tree(folder)
    if "params" not in stored:
        raise CheckpointError(f"{folder} does not hold weights under the key `params`; it has {sorted(stored)}.")
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(x: Any) -> jax.ShapeDtypeStruct:
        own = None if like is None else getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=own or first)

    tree = jax.tree.map(target, stored["params"] if like is None else like)
    return _restore(folder, stored, {"params": tree}, partial=partial)["params"]


def restore_train_state(path: str | Path, like: Any) -> Any:
    """Reads what `CheckpointWriter.save` was given as `train_state`.

    Args:
        path: anything that `resolve` takes.
        like: tree of `jax.ShapeDtypeStruct`s with shardings; restored into them, on however many devices.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: a checkpoint of weights only, a damaged one, or another tree than `like`.
    """
    folder = resolve(path) / "train_state"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.parent} holds weights only, so training cannot resume from it. "
            f"Start a new run from its weights: --init-from {folder.parent}"
        )
    return _restore(folder, _stored_tree(folder), like)


def stored_params(path: str | Path, like: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the weights of a checkpoint by their paths in the tree; the weights are not read.

    Args:
        path: anything that `resolve` takes.
        like: tree of arrays or `jax.ShapeDtypeStruct`s that the weights have to match.

    Raises:
        FileNotFoundError, CheckpointError: as `restore_params` would.
    """
    folder = resolve(path) / "params"
    stored = _stored_tree(folder)
    if like is not None:
        _require_alike(folder, stored, {"params": like}, partial=False)
    shapes = _by_name(stored.get("params", {}))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in shapes.items()}


def _orbax() -> Any:  # declared for the paths of etils alone, but takes those of pathlib
    return ocp.PyTreeCheckpointHandler()


def _stored_tree(folder: Path) -> dict[str, Any]:
    """Names, shapes and dtypes of a stored tree."""
    with _damage_explained(folder):
        return _orbax().metadata(folder).tree


def _restore(folder: Path, stored: dict[str, Any], like: Any, *, partial: bool = False) -> Any:
    """Reads a tree, or the subtree `like`, into the shardings of `like`; or says how the stored one differs."""
    _require_alike(folder, stored, like, partial)
    arguments = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape), like
    )
    with _damage_explained(folder):
        return _orbax().restore(
            folder, args=ocp.args.PyTreeRestore(item=like, restore_args=arguments, partial_restore=partial)
        )


def _require_alike(folder: Path, stored: Any, like: Any, partial: bool) -> None:
    """Raises CheckpointError where a stored tree lacks something, has too much, or has another shape."""
    have, want = ({name: x.shape for name, x in _by_name(tree).items()} for tree in (stored, like))
    problems = {
        "missing": [name for name in want if name not in have],
        "unexpected": [name for name in have if name not in want and not partial],
        "of another shape": [f"{n} {have[n]} for {want[n]}" for n in want if n in have and have[n] != want[n]],
    }
    if any(problems.values()):
        lines = [f"  {kind} ({len(names)}): {_first(names)}" for kind, names in problems.items() if names]
        raise CheckpointError(f"{folder} does not fit this model:\n" + "\n".join(lines))


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by their path."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def _first(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "")


@contextlib.contextmanager
def _damage_explained(folder: Path) -> Iterator[None]:
    """Names a missing or shortened file before Orbax meets it, and turns what Orbax raises into a CheckpointError."""
    require_files(folder)
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # the checkpoint is fine, the machine too small
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:300]
        raise CheckpointError(f"{folder} is damaged or incomplete: {reason}. {previous_step(folder.parent)}") from error
