"""The server's log."""

from __future__ import annotations

import json
import logging
import os
import threading
import time

from pi0_jax.serving.logs import BackgroundHandler, JsonLines, Text


def test_log_lines_are_json_and_message_line_breaks_are_escaped():
    record = logging.LogRecord("pi0_jax.serving", logging.WARNING, "", 0, "bad\nline %s", ("x",), None)
    record.session, record.error = "abc", "1"
    assert json.loads(JsonLines().format(record))["session"] == "abc"
    assert "\n" not in Text().format(record)
    assert "\n" not in JsonLines().format(record)


def test_an_unread_log_delays_nobody_and_reports_what_it_dropped():
    read, write = os.pipe()
    logger = logging.Logger("unread")
    logger.addHandler(handler := BackgroundHandler(JsonLines(), os.fdopen(write, "w"), waiting=20))
    begin = time.perf_counter()
    for number in range(200):
        logger.warning("%d %s", number, "x" * 10_000)  # a pipe holds 64 kB
    assert time.perf_counter() - begin < 1
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(os.fdopen(read)), daemon=True)
    reader.start()
    handler.flush()
    logger.warning("last")
    handler.flush()
    handler._stream.close()
    reader.join(10)
    messages = [json.loads(line)["message"] for line in lines]
    assert messages[0].startswith("0 ")
    assert messages[-1] == "last"
    dropped = [int(m.split()[0]) for m in messages if "were dropped" in m]
    assert sum(dropped) > 100
    assert sum(dropped) + len(messages) - len(dropped) - 1 == 200
