"""Checkpoints: one folder a step, written by training and conversion, read by training and inference.

    <run>/checkpoints/<step>/
        params/        the weights to run (their moving average where that is on), the PyTree item {"params": tree},
                       which openpi reads too
        train_state/   what only training needs: step, live weights (with a moving average), optimizer state
        data_state/    iterator.json: how far the data iterator got
        assets/        config.json, norm_stats.json, tokenizer.model: plain files for people and programs
        metrics/       the validation loss, where the best checkpoints are kept
        digests.json   size and CRC-32 of every file above

Running a policy takes `params` and `assets` and nothing from the repository. Orbax (v0 API) writes a step under a
temporary name, in a background thread, and renames it when it is complete: a folder with a step's name was whole when
it was written, and `verify` says whether it still is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cattrs
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policy
from orbax.checkpoint.checkpoint_args import register_with_handler

from pi0_jax.config import ModelConfig, PolicyConfig, TrainConfig

DIGESTS = "digests.json"
FORMAT_VERSION = 1
"""Of the folder's layout and of config.json; raised when old readers would misread new checkpoints."""

_log = logging.getLogger(__name__)
_CONVERTER = cattrs.Converter(forbid_extra_keys=True)
_structure_model = _CONVERTER.get_structure_hook(ModelConfig)


@_CONVERTER.register_structure_hook
def _(content: dict[str, Any], kind: type[ModelConfig]) -> ModelConfig:
    # Up to November 2026 `remat` was a truth value.
    names = {True: "full", False: "none"}
    return _structure_model(
        content | {"remat": names.get(content.get("remat", "full"), content.get("remat", "full"))}, kind
    )


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: foreign, incomplete, damaged, or of another model. The message says which."""


class Assets(NamedTuple):
    """What a policy needs besides weights."""

    policy: PolicyConfig
    norm_stats: dict[str, Any] | None
    """The JSON object of `norm_stats.json`; None for weights that belong to no data set yet."""
    tokenizer: bytes | None
    """A SentencePiece model file; None where the user has to bring it."""
    train: TrainConfig | None = None
    """The experiment that made the weights; None for converted ones."""


class _FilesHandler(ocp.CheckpointHandler):
    """Lets Orbax write plain files as an item, so that they become part of a step all or nothing."""

    def save(self, directory, args: _WriteFiles):
        if jax.process_index() == 0:
            for name, content in args.files.items():
                (directory / name).write_bytes(content)

    def restore(self, directory, args=None) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.iterdir()}


@register_with_handler(_FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _WriteFiles(ocp.args.CheckpointArgs):
    files: dict[str, bytes]


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    # Orbax lets each replica of an array write a part of it, and compiles a program for every such part: for small
    # arrays that takes far longer than the writing.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    types = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=types)


class CheckpointWriter:
    """Saves checkpoints of one run in the background; errors of a save surface at the next call of any method."""

    def __init__(self, run_dir: str | Path, keep: int, *, keep_every: int | None = None, keep_best: int = 0):
        """Opens `<run_dir>/checkpoints` and removes what a killed run left half-written there.

        Args:
            run_dir: the run's folder; made if missing.
            keep: number of newest checkpoints to keep; older ones go once a newer one is complete.
            keep_every: those whose step is a multiple of it stay too; None: none.
            keep_best: and so many of those with the lowest validation loss.

        Raises:
            ValueError: `keep` below 1.
            OSError: the folder cannot be made.
        """
        if keep < 1:
            raise ValueError(f"keep_checkpoints is {keep}; a run keeps at least 1 checkpoint.")
        self.folder = Path(run_dir).expanduser().absolute() / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._remove_unfinished()
        policies: list[Any] = [policy.LatestN(keep)]
        policies += [policy.EveryNSteps(keep_every)] if keep_every else []
        if keep_best:
            best = policy.BestN(
                get_metric_fn=_validation_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(policies),
            best_fn=_validation_loss if keep_best else None,
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, post_finalization_callback=self._write_digests
            ),
        )
        trees = {name: _tree_handler() for name in ("params", "train_state")}
        files = {name: _FilesHandler() for name in ("assets", "data_state")}
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=trees | files, options=options)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_):
        with self._explained():
            self._manager.close()

    def reserve(self, state, num_steps: int = 0):
        """Checks, before training starts, that disk and memory suffice for all checkpoints of the run.

        The newest is written before the oldest goes, so one more than those that are kept has to fit.

        Args:
            state: tree of arrays, or `jax.ShapeDtypeStruct`s with shardings, of all that is saved.
            num_steps: at the end of the run.

        Raises:
            OSError: too little free space, or memory.
        """
        kept = self._keep + self._keep_best + (num_steps // self._keep_every if self._keep_every else 0)
        _require_space(self.folder, max(1, kept + 1 - len(_steps(self.folder))) * tree_bytes(state))
        _require_memory(state)

    def save(
        self, step: int, params, assets: Assets, train_state=None, data_state: dict[str, Any] | None = None,
        validation_loss: float | None = None,
    ):  # fmt: skip
        """Starts to save a step, and returns once the arrays are safe from changes (donation included).

        Args:
            step: number of updates made.
            params: the weights to run.
            assets: the policy's plain files.
            train_state: any PyTree that `restore_train_state` shall give back; None for weights only.
            data_state: JSON state of the data iterator.
            validation_loss: by which the best checkpoints are kept; None: it was not measured at this step.

        Raises:
            OSError: this save, or the one before it, cannot be written; complete checkpoints stay as they are.
        """
        items = {"params": ocp.args.PyTreeSave({"params": params}), "assets": _WriteFiles(_asset_files(assets))}
        if train_state is not None:
            items["train_state"] = ocp.args.PyTreeSave(train_state)
        if data_state is not None:
            items["data_state"] = _WriteFiles({"iterator.json": _to_json(data_state)})
        with self._explained():
            self._manager.wait_until_finished()
            _require_space(self.folder, tree_bytes((params, train_state)))
            _require_memory((params, train_state))
            metrics = None if validation_loss is None else {"validation_loss": validation_loss}
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def check(self):
        """Raises OSError if a save in the background has failed; costs nothing otherwise."""
        if jax.process_index():
            with self._explained():
                self._manager.check_for_errors()
        # That would take the error away from the thread which then, on the first process, deletes older checkpoints.
        elif not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self):
        """Waits until the last save is complete. Raises OSError if it failed."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns whatever a writer thread raised into one OSError, and frees the disk of the half-written step."""
        try:
            yield
        except Exception as error:
            self._remove_unfinished()
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None) or errno.EIO
            last = latest_step(self.folder)
            kept = "no complete checkpoint exists yet" if last is None else f"{self.folder / str(last)} is complete"
            reason = os.strerror(number) if code else error
            raise OSError(number, f"could not save a checkpoint under {self.folder}: {reason}; {kept}") from error

    def _unfinished(self) -> list[Path]:
        return list(self.folder.glob("*.orbax-checkpoint-tmp*"))

    def _remove_unfinished(self):
        if jax.process_index():  # of several processes the first one's job
            return
        for path in self._unfinished():
            _log.info("removing %s, a save that never finished", path)
            shutil.rmtree(path, ignore_errors=True)

    def _write_digests(self):
        """Notes what the files of a save are, in the background, when all are written and before it gets its name."""
        if jax.process_index():
            return
        for folder in self._unfinished():
            # Beside these folders Orbax still writes notes of its own, which nothing here reads.
            files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
            content = {str(path.relative_to(folder)): list(_digest(path)) for path in files}
            (folder / DIGESTS).write_bytes(_to_json(content))


def verify(step: str | Path, part: tuple[int, int] = (0, 1), only: tuple[str, ...] = ()) -> None:
    """Reads the files of a checkpoint and compares them with what was written.

    Args:
        step: a step folder.
        part: (i, n) reads the i-th of n parts of the files, so that n processes share the work.
        only: folders of the step to read; empty: all of them.

    Raises:
        CheckpointError: a file is missing or has changed; the message names it, and the checkpoint before this one.
            One that was written before there were digests is only looked at for what has to be there.
    """
    folder = Path(step)
    if not (folder / "assets" / "config.json").is_file() or not (folder / "params").is_dir():
        raise CheckpointError(_diagnosis(folder))
    if not (folder / DIGESTS).exists():
        return
    index, count = part
    for name, (size, digest) in list(_read_json(folder / DIGESTS).items())[index::count]:
        path = folder / name
        if only and name.partition("/")[0] not in only:
            continue
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {path} is missing. {_before(folder)}")
        if path.stat().st_size != size or _digest(path) != (size, digest):
            raise CheckpointError(f"{folder} is damaged: {path} is not what was written. {_before(folder)}")


def set_aside(step: str | Path) -> Path:
    """Renames a damaged step folder, so that nothing takes it for a checkpoint, and returns its new path."""
    folder = Path(step)
    names = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in itertools.count())
    target = next(path for path in names if not path.exists())
    return folder.rename(target)


def restore_params(
    path: str | Path,
    like=None,
    *,
    dtype=None,
    sharding: jax.sharding.Sharding | None = None,
    partial: bool = False,
):
    """Reads the weights to run.

    Args:
        path: anything that `resolve` takes.
        like: tree of arrays or `jax.ShapeDtypeStruct`s that the weights have to match; its dtypes are used.
        dtype: dtype to cast to on the way in; None: that of `like`, or else the stored one.
        sharding: where to put all of them; None: where the leaves of `like` say, or else on the first device.
        partial: `like` is a part of the weights; the others are not read.

    Returns:
        A tree of `jax.Array`s.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: foreign, incomplete or damaged folder, or weights unlike `like`.
    """
    folder = resolve(path) / "params"
    stored = _stored_tree(folder)
    if "params" not in stored:
        raise CheckpointError(f"{folder} does not hold weights under the key `params`; it has {sorted(stored)}.")
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def wanted(x):
        own = None if like is None else getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding or own or first)

    tree = jax.tree.map(wanted, stored["params"] if like is None else like)
    return _restore(folder, stored, {"params": tree}, partial=partial)["params"]


def param_names(path: str | Path) -> frozenset[str]:
    """Paths of the weights of a checkpoint.

    Args:
        path: anything that `resolve` takes.
    """
    stored = _stored_tree(resolve(path) / "params").get("params", {})
    return frozenset(_name(path) for path, _ in jax.tree.leaves_with_path(stored))


def check_params(path: str | Path, like) -> None:
    """Raises what `restore_params` would raise for weights unlike `like`, without reading them."""
    folder = resolve(path) / "params"
    _require_alike(folder, _stored_tree(folder), {"params": like}, partial=False)


def restore_train_state(path: str | Path, like):
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


def load_assets(path: str | Path) -> Assets:
    """Reads the policy's configuration, statistics and tokenizer.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: foreign, incomplete or damaged folder, or one of another format version.
    """
    folder = resolve(path) / "assets"
    config = _read_json(folder / "config.json")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / 'config.json'} has format version {version}, and this pi0_jax reads {FORMAT_VERSION}. "
            "Use the version of pi0_jax that wrote it."
        )
    try:
        policy = _CONVERTER.structure(config["policy"], PolicyConfig)
        train = config["train"] and _CONVERTER.structure(config["train"] | {"policy": config["policy"]}, TrainConfig)
    except (KeyError, cattrs.BaseValidationError) as error:
        problems = [repr(error)] if isinstance(error, KeyError) else cattrs.transform_error(error, path="config")
        raise CheckpointError(f"{folder / 'config.json'} does not fit this version: {'; '.join(problems)}") from error
    with _damage_explained(folder):
        files = {name: (folder / name).read_bytes() for name in config["files"]}
        stats = files.get("norm_stats.json")
        return Assets(policy, stats and json.loads(stats), files.get("tokenizer.model"), train)


def write_assets(folder: str | Path, assets: Assets) -> None:
    """Writes the plain files of a checkpoint's `assets/`, for programs that write `params/` themselves."""
    for name, content in _asset_files(assets).items():
        Path(folder, name).write_bytes(content)


def policy_to_json(policy: PolicyConfig) -> dict[str, Any]:
    """A policy's configuration as a JSON object."""
    return _CONVERTER.unstructure(policy)


def policy_from_json(content: dict[str, Any]) -> PolicyConfig:
    """The inverse of `policy_to_json`.

    Raises:
        CheckpointError: the object is of another version.
    """
    try:
        return _CONVERTER.structure(content, PolicyConfig)
    except cattrs.BaseValidationError as error:
        problems = "; ".join(cattrs.transform_error(error, path="policy"))
        raise CheckpointError(f"this policy configuration does not fit this version: {problems}") from error


def load_data_state(path: str | Path) -> dict[str, Any]:
    """Reads the state of the data iterator.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: the checkpoint has none, or a damaged one.
    """
    return _read_json(resolve(path) / "data_state" / "iterator.json")


def latest_step(folder: str | Path) -> int | None:
    """Number of the newest complete checkpoint of a run folder or `checkpoints` folder; None if there is none."""
    folder = Path(folder).expanduser()
    return max(_steps(folder / "checkpoints") + _steps(folder), default=None)


def resolve(path: str | Path) -> Path:
    """The step folder that `path` means.

    Args:
        path: a run folder or its `checkpoints` folder (the newest step is taken), or a step folder.

    Raises:
        FileNotFoundError: no such path.
        CheckpointError: something else, or an incomplete checkpoint; the message says what it looks like.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        nearest = next(p for p in path.parents if p.exists())
        inside = ", ".join(sorted(p.name for p in nearest.iterdir())[:8]) if nearest.is_dir() else "a file"
        raise FileNotFoundError(f"no checkpoint at {path}: it does not exist. {nearest} has: {inside or 'nothing'}")
    for folder in (path / "checkpoints", path):
        if steps := _steps(folder):
            path = folder / str(steps[-1])
            break
    if (path / "assets" / "config.json").is_file() and (path / "params").is_dir():
        return path
    raise CheckpointError(_diagnosis(path))


def steps(run_dir: str | Path) -> list[int]:
    """Numbers of the complete checkpoints of a run folder, ascending."""
    return _steps(Path(run_dir).expanduser() / "checkpoints")


def tree_bytes(tree) -> int:
    """Bytes of all arrays (or `ShapeDtypeStruct`s) of a tree, over all devices, each counted once."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _steps(folder: Path) -> list[int]:
    """Numbers of the complete steps in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def _require_space(folder: Path, nbytes: int):
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {folder} has {free / 1e9:.2f} GB free and the run's checkpoints need {nbytes / 1e9:.2f} GB. "
            "Free some, choose another --run-dir, or lower --keep-checkpoints",
        )


def _require_memory(tree):
    """Raises OSError where this host has no room for the copy that a save in the background makes of its arrays."""
    needed, available = _staged_bytes(tree), available_memory()
    if available is not None and available < needed:
        raise OSError(
            errno.ENOMEM,
            f"this host has {available / 1e9:.2f} GB of memory available, and a save in the background needs a copy of "
            f"{needed / 1e9:.2f} GB. Free some, or divide the state over more hosts (--mesh.fsdp)",
        )


def _staged_bytes(tree) -> int:
    """Bytes of the parts of a tree that the devices of this process have, each part once."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding, size = getattr(x, "sharding", None), jnp.dtype(x.dtype).itemsize
        if sharding is None:
            total += x.size * size
        else:
            parts = {str(index) for index in sharding.addressable_devices_indices_map(x.shape).values()}
            total += len(parts) * math.prod(sharding.shard_shape(x.shape)) * size
    return total


def available_memory() -> int | None:
    """Bytes of memory that this host, or the container, can still give; None where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit, or no cgroup of version 2
        cached = int(re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)[0])
        used = int((group / "memory.current").read_text()) - cached
        found = min(found, int((group / "memory.max").read_text()) - used)
    return found


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]


def _digest(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _asset_files(assets: Assets) -> dict[str, bytes]:
    train = None
    if assets.train is not None:
        train = _CONVERTER.unstructure(assets.train)
        train.pop("policy")
    files = {}
    if assets.norm_stats is not None:
        files["norm_stats.json"] = _to_json(assets.norm_stats)
    if assets.tokenizer is not None:
        files["tokenizer.model"] = assets.tokenizer
    config = {
        "format_version": FORMAT_VERSION,
        "files": list(files),
        "policy": _CONVERTER.unstructure(assets.policy),
        "train": train,
    }
    return files | {"config.json": _to_json(config)}


def _to_json(value) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    with _damage_explained(path.parent):
        return json.loads(path.read_bytes())


def _stored_tree(folder: Path) -> dict[str, Any]:
    """Names, shapes and dtypes of a stored tree."""
    with _damage_explained(folder):
        return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree


def _restore(folder: Path, stored, like, *, partial: bool = False):
    """Reads a tree, or the part of it that `like` has, into the shardings of `like`; or says how the stored differs."""
    _require_alike(folder, stored, like, partial)
    arguments = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape), like
    )
    with _damage_explained(folder):
        return ocp.PyTreeCheckpointHandler().restore(
            epath.Path(folder),
            args=ocp.args.PyTreeRestore(item=like, restore_args=arguments, partial_restore=partial),
        )


def _require_alike(folder: Path, stored, like, partial: bool):
    """Raises CheckpointError where a stored tree lacks something, has too much, or has another shape."""
    have, want = ({_name(path): x.shape for path, x in jax.tree.leaves_with_path(tree)} for tree in (stored, like))
    problems = {
        "missing": [name for name in want if name not in have],
        "unexpected": [name for name in have if name not in want and not partial],
        "of another shape": [f"{n} {have[n]} for {want[n]}" for n in want if n in have and have[n] != want[n]],
    }
    if any(problems.values()):
        lines = [f"  {kind} ({len(names)}): {_shortened(names)}" for kind, names in problems.items() if names]
        raise CheckpointError(f"{folder} does not fit this model:\n" + "\n".join(lines))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shortened(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


@contextlib.contextmanager
def _damage_explained(folder: Path) -> Iterator[None]:
    """Turns whatever Orbax raises over missing or broken files into one CheckpointError that names the file."""
    hook = sys.unraisablehook
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # the checkpoint is fine, the machine too small
        raise
    except Exception as error:
        # Orbax leaves its unfinished coroutines to the garbage collector, which would print each one's traceback.
        sys.unraisablehook = lambda _: None
        gc.collect()
        chain = str(error) + str(error.__cause__)
        files = [f for f in re.findall(r'"(/[^"]+)"', chain) if not Path(f).is_dir()]
        where = f" ({files[-1]})" if files else ""
        raise CheckpointError(
            f"{folder} is damaged or incomplete{where}: {str(error).splitlines()[0][:200]}. {_before(folder.parent)}"
        ) from error
    finally:
        sys.unraisablehook = hook


def _before(step: Path) -> str:
    """A sentence that names the checkpoint to fall back to."""
    older = [s for s in _steps(step.parent) if step.name.isdecimal() and s < int(step.name)]
    return f"The checkpoint before it is {step.parent / str(older[-1])}." if older else "There is none before it."


_FOREIGN = {
    ".safetensors": "PyTorch weights (openpi-PyTorch or LeRobot)",
    ".npz": "big_vision weights (PaliGemma)",
    ".pt": "pickled PyTorch weights, which nobody should load; save them as safetensors",
    ".bin": "pickled PyTorch weights, which nobody should load; save them as safetensors",
}


def _diagnosis(path: Path) -> str:
    """Why a folder is no checkpoint of ours, and what to do."""
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if "orbax-checkpoint-tmp" in path.name:
        return f"{path} is a save that never finished; use a step folder beside it."
    if "checkpoints" in names or path.name == "checkpoints":
        return f"{path} has no complete checkpoint yet."
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        absent = "assets/config.json" if "params" in names else "params"
        return f"{path} is incomplete: {absent} is missing. {_before(path)}"
    if (path / "meta" / "info.json").exists():
        return f"{path} is a data set, not a checkpoint; it belongs in --data.path."
    endings = {Path(name).suffix for name in names | {path.name}}
    kinds = [kind for ending, kind in _FOREIGN.items() if ending in endings]
    if "params" in names or "_METADATA" in names:
        kinds.append("an openpi checkpoint")
    if kinds:
        return (
            f"{path} looks like {kinds[0]}, which has to be converted first: pi0 convert {path} TARGET. "
            "docs/checkpoints.md says what converts."
        )
    inside = ", ".join(sorted(names)[:8]) or "nothing"
    return f"{path} is not a pi0_jax checkpoint (params/ and assets/config.json); it has: {inside}."
