"""Ctrl-C and SIGTERM: finish the step, save, and say so; a second one quits at once."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path


@dataclasses.dataclass(eq=False)
class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    `exit_code` is 130 after SIGINT, as shells have it. It is 0 after SIGTERM: a scheduler that takes the machine back
    sees a job that ended in order.
    """

    step: int
    """Updates made."""
    folder: Path
    """Checkpoint of that step."""
    number: int
    """Signal that came."""
    resume: str = "--resume"
    """Flag, or command, that continues the run."""

    def __str__(self) -> str:
        return f"stopped at step {self.step}. Last checkpoint: {self.folder}. Continue with: {self.resume}"

    @property
    def exit_code(self) -> int:
        return 0 if self.number == signal.SIGTERM else 128 + self.number


class StopRequest:
    """A context in which SIGINT and SIGTERM set `number` and let the program go on to its next safe point.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    number: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame):
        if self.number is not None:
            os.write(sys.stderr.fileno(), b"\nquitting at once; --resume continues from the last complete checkpoint\n")
            os._exit(128 + number)  # without the handlers of threads that may hold locks
        self.number = number
        os.write(sys.stderr.fileno(), b"\nfinishing this step and saving; once more to quit at once\n")
