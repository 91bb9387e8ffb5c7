"""Saves the checkpoints of a run in the background, keeps the newest and best, and deletes the others."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as preservation

from pi0_jax.checkpoint.assets import Assets, asset_files, to_json, write_files
from pi0_jax.checkpoint.digests import write_digests
from pi0_jax.checkpoint.locate import latest_step, steps
from pi0_jax.checkpoint.space import require_disk, require_memory, tree_bytes
from pi0_jax.compat import ORBAX_UNFINISHED, tensorstore_errno
from pi0_jax.errors import UserError

_log = logging.getLogger(__name__)


class _FilesHandler(ocp.CheckpointHandler):
    """Lets Orbax write plain files as an item, so that they become part of a step all or nothing."""

    def save(self, directory: os.PathLike[str], args: _WriteFiles) -> None:
        if jax.process_index() == 0:
            write_files(Path(directory), args.files)

    def restore(self, directory: os.PathLike[str], args: Any = None) -> dict[str, bytes]:
        files = (path for path in Path(directory).rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@ocp.args.register_with_handler(_FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _WriteFiles(ocp.args.CheckpointArgs):
    files: dict[str, bytes]


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    # Orbax lets each replica of an array write a slice of it, and compiles a program for every such slice: for small
    # arrays that takes far longer than the writing.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    types = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=types)


class CheckpointWriter:
    """Saves checkpoints of one run in the background; errors of a save surface at the next call of any method."""

    def __init__(self, run_dir: str | Path, keep: int, *, keep_every: int | None = None, keep_best: int = 0):
        """Opens `<run_dir>/checkpoints`, made if missing, and removes what a killed run left half-written there.

        Args:
            keep: number of newest checkpoints to keep; older ones go once a newer one is complete.
            keep_every: those whose step is a multiple of it stay too; None: none.
            keep_best: number of checkpoints with the lowest validation loss to keep besides.

        Raises:
            UserError: `keep` below 1.
            OSError: the folder cannot be made.
        """
        if keep < 1:
            raise UserError(f"keep_checkpoints is {keep}; a run keeps at least 1 checkpoint.")
        self.folder = Path(run_dir).expanduser().absolute() / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._remove_unfinished()
        policies: list[Any] = [preservation.LatestN(keep)]
        policies += [preservation.EveryNSteps(keep_every)] if keep_every else []
        if keep_best:
            best = preservation.BestN(
                get_metric_fn=_validation_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies),
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

    def __exit__(self, *_: object) -> None:
        with self._explained():
            self._manager.close()

    def reserve(self, state: Any, num_steps: int = 0) -> None:
        """Raises OSError, before training starts, unless disk and memory suffice for all checkpoints of the run.

        The newest is written before the oldest goes, so one more than those that are kept has to fit.

        Args:
            state: tree of arrays, or `jax.ShapeDtypeStruct`s with shardings, of all that is saved.
            num_steps: at the end of the run.
        """
        kept = self._keep + self._keep_best + (num_steps // self._keep_every if self._keep_every else 0)
        require_disk(self.folder, max(1, kept + 1 - len(steps(self.folder.parent))) * tree_bytes(state))
        require_memory(state)

    def save(
        self,
        step: int,
        params: Any,
        assets: Assets,
        train_state: Any = None,
        data_state: dict[str, Any] | None = None,
        validation_loss: float | None = None,
    ) -> None:
        """Starts to save a step, and returns once the arrays are safe from changes (donation included).

        Args:
            step: number of updates made.
            params: the weights to run.
            assets: the policy's plain files.
            train_state: any PyTree, for `restore_train_state`; None for weights only.
            data_state: JSON state of the data iterator.
            validation_loss: by which the best checkpoints are kept; None: it was not measured at this step.

        Raises:
            OSError: this save, or the one before it, cannot be written; complete checkpoints stay as they are.
        """
        items: dict[str, Any] = {"params": ocp.args.PyTreeSave({"params": params})}
        items["assets"] = _WriteFiles(asset_files(assets))
        if train_state is not None:
            items["train_state"] = ocp.args.PyTreeSave(train_state)
        if data_state is not None:
            items["data_state"] = _WriteFiles({"iterator.json": to_json(data_state)})
        with self._explained():
            self._manager.wait_until_finished()
            require_disk(self.folder, tree_bytes((params, train_state)))
            require_memory((params, train_state))
            metrics = None if validation_loss is None else {"validation_loss": validation_loss}
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def check(self) -> None:
        """Raises OSError if a save in the background has failed; costs nothing otherwise."""
        if jax.process_index():
            with self._explained():
                self._manager.check_for_errors()
        # That would take the error away from the thread which then, on the first process, deletes older checkpoints.
        elif not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
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
            code = tensorstore_errno(error)
            number = code or getattr(error, "errno", None) or errno.EIO
            last = latest_step(self.folder)
            kept = "no complete checkpoint exists yet" if last is None else f"{self.folder / str(last)} is complete"
            reason = os.strerror(number) if code else error
            raise OSError(number, f"could not save a checkpoint under {self.folder}: {reason}; {kept}") from error

    def _unfinished(self) -> list[Path]:
        return list(self.folder.glob(f"*{ORBAX_UNFINISHED}*"))

    def _remove_unfinished(self) -> None:
        if jax.process_index():  # of several processes the first one's job
            return
        for path in self._unfinished():
            _log.info("removing %s, a save that never finished", path)
            shutil.rmtree(path, ignore_errors=True)

    def _write_digests(self) -> None:
        """Runs in the background, when all files of a save are written and before the step gets its name."""
        if jax.process_index() == 0:
            for folder in self._unfinished():
                write_digests(folder)


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]
