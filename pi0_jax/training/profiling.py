"""A trace of some updates, for xprof: what the devices did when, and what they waited for."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import jax

from pi0_jax.errors import UserError

_log = logging.getLogger(__name__)


Span = tuple[int, int]
"""The first update to record, and the first one after it that is not."""


def parse_span(text: str | None) -> Span | None:
    """`TrainConfig.profile`, START:STOP, as numbers.

    Raises:
        UserError: an invalid span.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise UserError(
            f"profile is {text!r}; expected START:STOP, the number of the first update to record and of the first "
            "one not to, such as 100:105."
        )
    return int(match[1]), int(match[2])


class Profile:
    """Records the updates of a span in a folder; of None, none."""

    def __init__(self, span: Span | None, folder: Path):
        self._start, self._stop = span or (0, 0)
        self._folder, self._running = folder, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_):
        self._end()

    def before(self, update: int, waiting_for) -> None:
        """To be called before every update, with its number and arrays that the updates before it made."""
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
