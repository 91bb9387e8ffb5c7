"""Where the time of a policy's calls goes."""

from __future__ import annotations

import collections
from typing import NamedTuple

import numpy as np

KEPT = 1000
"""Number of the last calls whose times are kept."""


class Timing(NamedTuple):
    """Where the time of one call went, seconds."""

    transform: float
    """From raw observations to the model's arrays."""
    device: float
    """The program, until its result is in host memory; the first call of each program compiles."""
    postprocess: float
    """From the model's actions to the robot's."""


class Latency:
    """Times of the last calls."""

    def __init__(self):
        self._timings: collections.deque[Timing] = collections.deque(maxlen=KEPT)

    def record(self, timing: Timing) -> None:
        self._timings.append(timing)

    def clear(self) -> None:
        self._timings.clear()

    def percentiles(self) -> dict[str, dict[str, float]]:
        """p50, p95 and p99 per stage (the fields of `Timing`) and in total, milliseconds; empty without calls."""
        if not self._timings:
            return {}
        table = 1000 * np.array(self._timings)
        columns = dict(zip(Timing._fields, table.T, strict=True)) | {"total": table.sum(1)}
        return {
            name: {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} for name, values in columns.items()
        }
