"""How many updates may be skipped because loss or gradient was not finite, before a run stops."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

_log = logging.getLogger(__name__)


class Diverged(FloatingPointError):
    """Losses or gradients were not finite too often, or the weights are not; the message names step and number."""


class Guard:
    """Counts the skipped updates of a run, those before it was resumed included.

    Args:
        in_row, in_total: how many may be skipped; one more stops the run.
        before: how many were, in a row at the end and in all.
    """

    def __init__(self, in_row: int, in_total: int, before: tuple[int, int] = (0, 0)):
        self._most, (self._row, self.total) = (in_row, in_total), before

    def see(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of the next update.

        Raises:
            Diverged: it was skipped, and one too many; or its weights are not finite.
        """
        bad = [name for name in ("param_norm", "loss", "grad_norm") if not math.isfinite(values[name])]
        if not bad:
            self._row = 0
            return
        self._row, self.total = self._row + 1, self.total + 1
        what = f"{bad[0]} is {values[bad[0]]} at step {step}"
        if bad[0] == "param_norm" or self._row > self._most[0] or self.total > self._most[1]:
            skipped = f", after {self._row - 1} updates in a row and {self.total - 1} in all were skipped for the like"
            raise Diverged(f"training diverged: {what}{skipped if self.total > 1 else ''}")
        _log.warning("%s: the update was skipped, the %d. in a row and the %d. in all", what, self._row, self.total)


def skipped_before(rows: Path, step: int) -> tuple[int, int]:
    """Updates up to `step` that `metrics.jsonl` says were skipped: in a row at the end, and in all."""
    in_row = total = 0
    for line in rows.read_text().splitlines() if rows.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the end of a process that was killed
            continue
        if row["step"] <= step and "skipped" in row:
            in_row = in_row + 1 if row["skipped"] else 0
            total += row["skipped"] > 0
    return in_row, total
