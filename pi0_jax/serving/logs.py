"""The server's log as lines of JSON, for machines that collect them."""

from __future__ import annotations

import json
import logging
import sys
import time

FIELDS = ("session", "peer", "error", "outcome", "answered")
"""What a record may carry beside its message."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the fields above, and a traceback where there is
    one."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        entry = {
            "time": stamp,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class Text(logging.Formatter):
    """A message with its fields behind it, for people. Line breaks of strangers do not break lines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name))
        line = record.getMessage().replace("\n", "\\n").replace("\r", "\\r") + (f"  ({fields})" if fields else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(form: str) -> None:
    """Makes the log of this package `text` or `json` on stderr, whatever it was."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else Text())
    logger = logging.getLogger("pi0_jax")
    logger.handlers, logger.propagate = [handler], False
