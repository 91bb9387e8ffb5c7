"""The first signal asks, the second one quits, and outside the context nothing has changed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pi0_jax.training.interrupt import Interrupted, StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_is_noted_and_the_program_goes_on(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.number is None
        signal.raise_signal(number)
        assert stop.number == number
    assert signal.getsignal(number) is before
    stopped = Interrupted(5, Path("run/checkpoints/5"), number)
    assert stopped.exit_code == code
    assert str(stopped) == "stopped at step 5. Last checkpoint: run/checkpoints/5. Continue with: --resume"


def test_a_second_signal_quits_at_once():
    program = """
import signal
from pi0_jax.training.interrupt import StopRequest
with StopRequest():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == ""
    assert "once more to quit" in done.stderr
    assert "--resume" in done.stderr
