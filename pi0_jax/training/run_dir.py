"""The run's folder: whether a run may start, resume or overwrite there."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from pi0_jax import checkpoint
from pi0_jax.config import TrainConfig
from pi0_jax.errors import UserError
from pi0_jax.training import multihost, tracker
from pi0_jax.training.metrics import FILE, TIMING_FILE

_MAY_CHANGE = """
run_dir resume overwrite num_steps log_every validate_every save_every keep_checkpoints keep_every keep_best mesh hosts
data.num_threads data.num_workers data.prefetch data.frames data.kept_gb data.offline data.prompt_buckets
grad_accum_steps max_consecutive_skips max_total_skips compilation_cache profile tracker
policy.model.remat policy.model.attention
"""
MAY_CHANGE = tuple(_MAY_CHANGE.split())
"""Fields, or groups of them, that a resumed run may change: none changes an update but for rounding."""

_log = logging.getLogger(__name__)


def open_run(config: TrainConfig) -> Path | None:
    """Checks the folder of a run, makes it, and decides where the run starts. Deletes nothing: see `delete_run`.

    Checkpoints that are damaged are named, set aside and passed over. With several processes all of them call this.

    Args:
        config: `run_dir`, `resume`, `overwrite`; a resumed run compares all other fields with the checkpoint's.

    Returns:
        The step folder to resume from, or None to start anew.

    Raises:
        FileExistsError: the folder holds a run, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: nothing to resume.
        UserError: contradictory flags, or a configuration other than the run's.
        OSError: the folder cannot be written to.
    """
    run_dir = Path(config.run_dir).expanduser()
    exists = (run_dir / "checkpoints").is_dir() or (run_dir / FILE).exists()
    if config.resume and config.overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it; give one of them.")
    if config.resume and not exists:
        raise FileNotFoundError(f"--resume: there is no run in {run_dir}. Leave --resume out to start one there.")
    if exists and not config.resume and not config.overwrite:
        raise FileExistsError(
            f"{run_dir} holds a run (newest checkpoint: {checkpoint.latest_step(run_dir)}). "
            "Continue it with --resume, delete it with --overwrite, or choose another --run-dir."
        )
    _require_writable(run_dir)
    if not config.resume:
        return None
    step = _newest_undamaged(run_dir)
    if step is None:
        _log.info("%s has no complete checkpoint yet: starting from step 0", run_dir)
        return None
    folder = run_dir / "checkpoints" / str(step)
    _require_same(config, checkpoint.load_assets(folder).train, folder)
    return folder


def _newest_undamaged(run_dir: Path) -> int | None:
    """The newest undamaged checkpoint; each process verifies its own slice of the files."""
    for step in reversed(checkpoint.steps(run_dir)):
        folder = run_dir / "checkpoints" / str(step)
        problem = None
        try:
            checkpoint.verify(folder, (jax.process_index(), jax.process_count()))
        except checkpoint.CheckpointError as error:
            problem = error
        if multihost.all_true(problem is None):
            return step
        if problem is not None:
            _log.warning("%s It is skipped.", problem)
        with multihost.first_before_others("damaged checkpoint"):
            if multihost.is_first():
                _log.warning("%s is damaged; now called %s", folder, checkpoint.set_aside(folder))
    return None


def differences(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations differ, by dotted name."""
    found = {}
    for field in dataclasses.fields(a):
        name, x, y = prefix + field.name, getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x) and type(x) is type(y):
            found |= differences(x, y, name + ".")
        elif x != y:
            found[name] = (x, y)
    return found


def _require_same(config: TrainConfig, before: TrainConfig | None, folder: Path):
    if before is None:
        raise UserError(f"{folder} was not made by a training run; start from its weights with --init-from {folder}")
    changed = differences(before, config)
    refused = {k: v for k, v in changed.items() if not any(k == m or k.startswith(m + ".") for m in MAY_CHANGE)}
    if refused:
        lines = "\n".join(f"  {name}: {old!r} then, {new!r} now" for name, (old, new) in refused.items())
        raise UserError(
            f"--resume: the configuration differs from that of {folder}:\n{lines}\n"
            "Take those back, or repeat flags that the first call had. To change them, start anew from the weights: "
            f"--init-from {folder} --run-dir NEW"
        )
    if "num_steps" in changed and config.optim.decay_steps is None:
        _log.warning("num_steps changed, and with it the learning rate, which decays over the run's length")


def delete_run(run_dir: Path):
    """Deletes checkpoints, metrics and event files of a run, and nothing else that lies in its folder."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    for path in (
        *(run_dir / name for name in (FILE, TIMING_FILE, tracker.FILE)),
        *run_dir.glob("events.out.tfevents.*"),
    ):
        path.unlink(missing_ok=True)


def _require_writable(run_dir: Path):
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write to the run's folder {run_dir}: {error.strerror}") from error
