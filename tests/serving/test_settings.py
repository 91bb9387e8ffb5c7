"""Deadlines that fit the policy."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest

from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import DEADLINE, Settings, choose_deadline
from tests.serving.fake import FakePolicy


@pytest.mark.parametrize(
    ("deadline", "seconds", "chosen", "message"),
    [
        (None, {1: 0.1, 8: 0.5}, DEADLINE, None),
        (None, {1: 9.5, 8: 60.25}, 181, r"time of a batch by its size: 1: 9.5 s, 8: 60.2 s\): .*refused after 181 s"),
        (200.0, {1: 9.5, 8: 60.25}, 200, None),
        (
            30.0,
            {1: 9.5, 8: 60.25},
            30,
            "30 is too short.*requests that wait for others.*at least 121.*sizes 1",
        ),
        (5.0, {1: 9.5, 8: 60.25}, 5, "5 is too short.*every request will be refused"),
    ],
)
def test_a_deadline_fits_the_policy_or_a_warning_says_so(deadline, seconds, chosen, message, caplog):
    assert choose_deadline(deadline, seconds) == chosen
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warnings) == (message is not None)
    assert all(re.search(str(message), warning) for warning in warnings)


def test_the_server_chooses_by_what_its_policy_takes():
    class Slow(FakePolicy):
        def warm_up(self):
            return super().warm_up() | {8: 20.0}

    server = PolicyServer(Slow(), Settings(port=0))

    async def run():
        async with server:
            assert server._batcher.deadline == 60.0

    asyncio.run(run())
