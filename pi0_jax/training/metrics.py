"""Numbers of a run: `metrics.jsonl`, trackers such as TensorBoard, and the progress line on the terminal.

`metrics.jsonl` holds what the run computes, and reads the same however often the run was stopped: one row per update,
and one per validation; `step` counts updates, so the row of step n is the n-th update and checkpoint n holds its
result. Floats are written so that they read back exactly. What depends on the machine is in `timing.jsonl`: per update
its seconds, and the fraction of them spent waiting for its batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from pi0_jax import flops
from pi0_jax.atomic import written
from pi0_jax.objective import Metrics
from pi0_jax.training.guard import Guard, skipped_before
from pi0_jax.training.resolve import Run
from pi0_jax.training.tracker import TensorBoard, Tracker

FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"
WAIT_TO_REPORT = 0.2
"""Fraction of the time spent waiting for batches above which the log says so."""
_ADVICE = {
    "input_pictures": "reading pictures; decode them once (pi0 data cache)",
    "input_columns": "reading columns",
    "input_transform": "resizing and tokens; keep resized frames (pi0 data cache)",
}
_log = logging.getLogger(__name__)


class Reporter:
    """Reports the updates of one run, each one update late, so that the device never waits for the host."""

    def __init__(
        self,
        run_dir: Path,
        *,
        start: int,
        num_steps: int,
        batch_size: int,
        log_every: int,
        gauges: Callable[[], dict[str, float]] = dict,
        max_skips: tuple[int, int] = (0, 0),
        ideal_seconds: float | None = None,
        trackers: Sequence[Tracker] = (),
        write: bool = True,
    ):
        """Opens the files of a run.

        Args:
            run_dir: the run's folder.
            start: updates made so far; rows of later ones, from a run that was killed, are dropped.
            num_steps: updates at the end of the run.
            batch_size: samples per update, for the rate.
            log_every: updates between lines on the terminal and points of trackers.
            gauges: `data.loader.Loader.gauges`, measured since the last call; called once per update.
            max_skips: consecutive updates, and updates in total, that may be skipped because they are not finite.
            ideal_seconds: duration of an update at the devices' peak (`seconds_at_peak`); None: unknown.
            trackers: what takes the points besides TensorBoard's event files; finished with the run.
            write: False for all processes but the first: they check the numbers, and write and show nothing.
        """
        self._guard = Guard(*max_skips, before=skipped_before(run_dir / FILE, start))
        rows, timing = (run_dir / name if write else Path(os.devnull) for name in (FILE, TIMING_FILE))
        if write:
            drop_rows_after(rows, start)
            drop_rows_after(timing, start)
        self._rows = rows.open("a", buffering=1)
        self._timing = timing.open("a", buffering=1)
        self._gauges, self._gauged_at = gauges, time.perf_counter()
        self._gauged: list[tuple[float, dict[str, float]]] = []
        """Seconds and gauges of the updates since the last line on the terminal."""
        self._first_line = True
        self._trackers: list[Tracker] = [TensorBoard(run_dir, start), *trackers] if write else []
        hidden = None if write else True  # None: where there is no terminal
        self._bar = tqdm(total=num_steps, initial=start, unit="step", dynamic_ncols=True, disable=hidden)
        self._batch_size, self._log_every, self._ideal = batch_size, log_every, ideal_seconds
        self._pending: tuple[int, Metrics] | None = None
        self._since: tuple[int, float] | None = None
        """Step and moment from which the rate is measured."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_):
        self._bar.close()
        with contextlib.suppress(OSError):  # every write was flushed, so an error has been raised before
            self._rows.close()
            self._timing.close()
            for tracker in self._trackers:
                tracker.finish()

    def push(self, step: int, metrics: Metrics):
        """Takes the metrics of an update that may still be running, and reports the update before it.

        Raises:
            Diverged: that update was one skipped update too many.
        """
        self.flush()
        self._pending = (step, metrics)
        if gauges := self._gauges():
            now = time.perf_counter()
            self._gauged.append((now - self._gauged_at, gauges))
            self._gauged_at = now
            with self._explained():
                row = {"step": step, "seconds": round(self._gauged[-1][0], 6), "input_wait": gauges["input_wait"]}
                self._timing.write(json.dumps(row) + "\n")

    def flush(self):
        """Waits for the update that was pushed last and reports it.

        Raises:
            Diverged: it was one skipped update too many.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in sorted(jax.device_get(metrics).items())}
        self._since = self._since or (step, time.monotonic())  # the first update compiles
        self._write_row(step, values)
        self._guard.see(step, values)
        if step % self._log_every == 0 or step == self._bar.total:
            self._show(step, values)
        self._bar.update(step - self._bar.n)

    def write(self, step: int, values: dict[str, float]):
        """Adds a row of other numbers, such as the validation loss, and shows it."""
        self._write_row(step, values)
        self._plot(step, values)
        _log.info("step %d: %s", step, _text(values))
        self._since = (step, time.monotonic())  # validation does not count as training time

    def _show(self, step: int, values: dict[str, float]):
        assert self._since is not None
        before, then = self._since
        self._since = (step, time.monotonic())
        seconds = (self._since[1] - then) / (step - before) if step > before else math.nan
        shown = {name: values[name] for name in ("loss", "grad_norm")} | {"samples/s": self._batch_size / seconds}
        gauges = self._mean_gauges() | {"peak_memory_GB": peak_memory() / 1e9}
        if self._ideal is not None:
            gauges["mfu"] = shown["MFU"] = self._ideal / seconds
        shown |= {name: gauges[name] for name in ("input_wait", "peak_memory_GB") if name in gauges}
        self._plot(step, values | {"samples_per_second": shown["samples/s"]} | gauges)
        if gauges.get("input_wait", 0) > WAIT_TO_REPORT:
            slowest = max(_ADVICE, key=lambda name: gauges.get(name, 0))
            _log.warning(
                "data are the bottleneck: %.0f %% of the time was spent waiting for batches, %.0f %% of whose "
                "preparation is %s. More --data.num-threads, or --data.num-workers, may help too.",
                100 * gauges["input_wait"],
                100 * gauges.get(slowest, 0),
                _ADVICE[slowest],
            )
        self._bar.set_postfix_str(_text(shown), refresh=False)
        if self._bar.disable:
            left = tqdm.format_interval(seconds * (self._bar.total - step)) if step > before else "?"
            _log.info("step %d of %d: %s, left %s", step, self._bar.total, _text(shown), left)

    def _mean_gauges(self) -> dict[str, float]:
        """Mean gauges since the last line, weighted by seconds; the first update compiles and is left out."""
        updates = self._gauged[1:] if self._first_line else self._gauged
        self._first_line, self._gauged = False, []
        total = sum(seconds for seconds, _ in updates)
        if not total:
            return {}
        return {name: sum(s * gauges[name] for s, gauges in updates) / total for name in updates[0][1]}

    def _write_row(self, step: int, values: dict[str, float]):
        with self._explained():
            self._rows.write(json.dumps({"step": step} | values) + "\n")

    def _plot(self, step: int, values: dict[str, float]):
        for tracker in self._trackers:
            tracker.log(values, step=step)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"cannot write metrics to {self._rows.name}: {error.strerror}"
            raise OSError(error.errno, f"{what}. Complete checkpoints stay; continue with --resume") from error


def seconds_at_peak(run: Run) -> float | None:
    """Seconds per update if all devices computed at their peak, and only what the loss asks for.

    Model FLOPs utilisation, MFU, is this over the actual seconds: rematerialisation is no model FLOP, and frozen
    parameters have no gradient. None for devices whose peak is unknown, which a line in the log says.
    """
    kind = run.mesh.devices.flat[0].device_kind
    if (peak := flops.peak(kind)) is None:
        _log.info("MFU is left out: the peak of a device of kind %r is not known", kind)
        return None
    model = dataclasses.replace(run.policy.model, remat="none")
    work = flops.training(model, run.policy.objective, frozen=run.frozen)
    return work * run.config.batch_size / (peak * run.mesh.size)


def peak_memory() -> float:
    """Bytes in use at most so far, on the fullest device of this process; of CPUs the process's own."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return float(max(used, default=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def drop_rows_after(path: Path, step: int):
    """Removes rows of later steps, and a last row cut short, so that a resumed run reads as if never stopped."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    with written(path) as partial:
        partial.write_text("".join(kept))


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
