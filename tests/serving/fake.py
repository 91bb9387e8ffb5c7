"""For the tests of serving: a policy that needs no network and no JAX; servers in a thread or a process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import Settings


class FakePolicy:
    """Its chunk is a function of the state and of how many requests the session has had."""

    batch_sizes = (1, 2, 4, 8)
    parallel = 1

    def __init__(self, seconds: float = 0.0):
        self.metadata = {"robot": "fake", "actions": ["a", "b"]}
        self.seconds = seconds
        self.batches: list[int] = []
        self.warm = False

    def warm_up(self) -> None:
        self.warm = True

    def validate(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict) or "state" not in request:
            raise ValueError("the observation lacks ['state'].")
        state = np.asarray(request["state"], np.float32)
        if state.shape != (2,) or not np.isfinite(state).all():
            raise ValueError(f"`state` has shape {state.shape}; expected (2,), finite.")
        return request | {"state": state}

    def infer_batch(self, observations, sessions):
        assert self.warm
        self.batches.append(len(observations))
        time.sleep(self.seconds)
        if any(observation.get("crash") for observation in observations):
            raise RuntimeError("secret detail")
        pairs = zip(observations, sessions, strict=True)
        return [self.answer(o["state"], session.answered, o.get("nan", False)) for o, session in pairs]

    def answer(self, state, answered: int, nan: bool = False) -> dict[str, Any]:
        """What a client should get."""
        actions = np.outer(np.arange(1, 4, dtype=np.float32), state) + answered
        if nan:
            actions[1, 1] = np.nan
        return {"actions": actions.astype(np.float32), "policy_timing": {"infer_ms": 1000 * self.seconds}}


@contextlib.contextmanager
def serving(policy: Any, token: str | None = None, tls: Any = None, **settings: Any) -> Iterator[PolicyServer]:
    """A server in a thread of its own. Its loop is `server.loop`; `call` runs a coroutine there."""
    server = PolicyServer(policy, Settings(**{"port": 0, "drain": 2.0} | settings), token=token, tls=tls)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(coroutine, timeout: float = 30.0):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout)

    server.call = call  # pyright: ignore[reportAttributeAccessIssue]
    try:
        call(server.start())
        yield server
    finally:
        if server._listener is not None:
            call(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def command(run: Path, log: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address and the process of `pi0 serve RUN`, which ends by SIGTERM, and well; its log goes to a file."""
    arguments = [sys.executable, "-m", "pi0_jax.cli", "serve", str(run), "--port", "0", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: ws://127.0.0.1:"), log.read_text()
        yield line.split()[1], process
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
