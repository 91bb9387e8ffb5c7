"""The server's log: lines for people or JSON for machines, written by a thread of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
import threading
import time
from typing import TextIO

FIELDS = ("session", "peer", "error", "outcome", "answered")
"""Attributes that a record may have beside its message."""


class JsonLines(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, the fields above, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        entry = {"time": stamp, "level": record.levelname.lower(), "logger": record.name}
        entry["message"] = record.getMessage()
        entry |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class Text(logging.Formatter):
    """A message followed by its fields, for people. Line breaks in a message are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name))
        line = record.getMessage().replace("\n", "\\n").replace("\r", "\\r") + (f"  ({fields})" if fields else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class BackgroundHandler(logging.handlers.QueueHandler):
    """Writes records in a thread of its own, so that a pipe which nobody reads delays no request.

    Up to `waiting` records wait; more are dropped, and a line says how many.
    """

    def __init__(self, formatter: logging.Formatter, stream: TextIO, waiting: int = 10_000):
        self._waiting: queue.Queue[logging.LogRecord] = queue.Queue(waiting)
        super().__init__(self._waiting)
        self.setFormatter(formatter)
        self._stream, self._dropped = stream, 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Waits until everything is written, two seconds at most; `logging.shutdown` calls it when the process ends."""
        end = time.monotonic() + 2
        while self._waiting.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:
            lines = [self._waiting.get().getMessage()]
            if dropped := self._dropped:
                self._dropped = 0
                text = f"{dropped} lines of the log were dropped, because they came faster than they were read"
                lines.append(self.format(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)))
            with contextlib.suppress(OSError, ValueError):  # the reader is gone
                print(*lines, sep="\n", file=self._stream, flush=True)
            self._waiting.task_done()


def set_up(form: str) -> None:
    """Sends this package's log to stderr, as `text` or `json`."""
    logger = logging.getLogger("pi0_jax")
    logger.handlers = [BackgroundHandler(JsonLines() if form == "json" else Text(), sys.stderr)]
    logger.propagate = False
