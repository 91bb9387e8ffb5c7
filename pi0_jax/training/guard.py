"""How many updates may be skipped because loss or gradient was not finite, before a run stops.

The update itself leaves the state as it was (`step.make_update`). `optax.apply_if_finite` is not used: it guards the
optimizer alone, so the moving average would take up the bad weights, and its count of consecutive errors would have to
be part of the optimizer state of every checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

_log = logging.getLogger(__name__)


class Diverged(FloatingPointError):
    """Losses or gradients were not finite too often, or the weights are not; the message names step and number."""

    exit_code = 1


class Guard:
    """Counts the skipped updates of a run, including those before it was resumed.

    Args:
        max_consecutive, max_total: how many may be skipped; one more stops the run.
        before: number that were skipped, consecutive at the end and in total.
    """

    def __init__(self, max_consecutive: int, max_total: int, before: tuple[int, int] = (0, 0)):
        self._max_consecutive, self._max_total = max_consecutive, max_total
        self._consecutive, self.total = before

    def see(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of the next update.

        Raises:
            Diverged: it was one skipped update too many; or its weights are not finite.
        """
        bad = [name for name in ("param_norm", "loss", "grad_norm") if not math.isfinite(values[name])]
        if not bad:
            self._consecutive = 0
            return
        self._consecutive, self.total = self._consecutive + 1, self.total + 1
        what = f"{bad[0]} is {values[bad[0]]} at step {step}"
        if bad[0] == "param_norm" or self._consecutive > self._max_consecutive or self.total > self._max_total:
            skipped = f", after skipping {self._consecutive - 1} consecutive updates, {self.total - 1} in total"
            raise Diverged(f"training diverged: {what}{skipped if self.total > 1 else ''}")
        _log.warning("%s: update skipped (%d consecutive, %d in total)", what, self._consecutive, self.total)


def skipped_before(rows: Path, step: int) -> tuple[int, int]:
    """Skipped updates up to `step` according to `metrics.jsonl`: consecutive at the end, and in total."""
    consecutive = total = 0
    for line in rows.read_text().splitlines() if rows.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the end of a process that was killed
            continue
        if row["step"] <= step and "skipped" in row:
            consecutive = consecutive + 1 if row["skipped"] else 0
            total += row["skipped"] > 0
    return consecutive, total
