"""A trace of some updates, for xprof: what the devices did when, and what they waited for."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import jax

_log = logging.getLogger(__name__)


class Profile:
    """Records updates of a run.

    Args:
        span: START:STOP, the first update to record and the first one after that which is not; None: records nothing.
        folder: for the trace.

    Raises:
        ValueError: a span that is none.
    """

    def __init__(self, span: str | None, folder: Path):
        match = re.fullmatch(r"(\d+):(\d+)", span or "")
        if span is not None and (match is None or not 0 < int(match[1]) < int(match[2])):
            raise ValueError(
                f"profile is {span!r}; expected START:STOP, the number of the first update to record and of the first "
                "one not to, such as 100:105."
            )
        self._start, self._stop = (int(match[1]), int(match[2])) if match else (0, 0)
        self._folder, self._running = folder, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_):
        self._end()

    def before(self, update: int, waiting_for) -> None:
        """To be told the number of every update before it is made, and arrays that those before it made."""
        if update == self._start and not self._running:
            jax.block_until_ready(waiting_for)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif update == self._stop:
            jax.block_until_ready(waiting_for)
            self._end()

    def _end(self):
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            _log.info("profile: %s; look at it with: xprof --logdir %s", self._folder, self._folder)
