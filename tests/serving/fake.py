"""For the tests of serving: a policy that needs no network and no JAX; servers in a thread or a process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from websockets.client import ClientProtocol
from websockets.protocol import State
from websockets.uri import parse_uri

from pi0_client.client import Client, ServerError
from pi0_client.msgpack_numpy import pack
from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import Settings

STATE = {"state": np.array([1.0, 2.0], np.float32)}
"""A request of `FakePolicy`."""


class FakePolicy:
    """Its chunk is a function of the state and of the session's number of answers.

    Args:
        seconds: duration of an inference.
        gate: an inference does not end before this is set.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    parallel = 1

    def __init__(self, seconds: float = 0.0, gate: threading.Event | None = None):
        self.metadata = {"robot": "fake", "actions": ["a", "b"]}
        self.seconds, self.gate = seconds, gate
        self.batches: list[int] = []
        self.warm = False

    def warm_up(self) -> dict[int, float]:
        self.warm = True
        return dict.fromkeys(self.batch_sizes, self.seconds)

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
        assert self.gate is None or self.gate.wait(30)
        if any(observation.get("crash") for observation in observations):
            raise RuntimeError("secret detail")
        pairs = zip(observations, sessions, strict=True)
        return [self.answer(o["state"], session.answered, o.get("nan", False)) for o, session in pairs]

    def answer(self, state, answered: int, nan: bool = False) -> dict[str, Any]:
        """The expected answer."""
        actions = np.outer(np.arange(1, 4, dtype=np.float32), state) + answered
        if nan:
            actions[1, 1] = np.nan
        return {"actions": actions.astype(np.float32), "policy_timing": {"infer_ms": 1000 * self.seconds}}


@contextlib.contextmanager
def serving(policy: Any, token: str | None = None, tls: Any = None, **settings: Any) -> Iterator[PolicyServer]:
    """A server in a thread of its own. Its loop is `server.loop`; `call` runs a coroutine there."""
    server = PolicyServer(policy, Settings(**{"port": 0, "drain": 2.0} | settings), token=token, tls=tls)
    loops: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()

    def run():
        with asyncio.Runner() as runner:  # at its end nothing is left over that would need the loop after it is closed
            loops.put(runner.get_loop())
            runner.get_loop().run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    loop = loops.get()

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
        assert loop.is_closed()


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


def get(server, path: str, **headers: str) -> tuple[int, str]:
    """Status and body of a page of the server's."""
    request = urllib.request.Request(server.uri.replace("ws", "http", 1) + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def attempt(client: Client, request: dict):
    try:
        return client.infer(request)
    except (ServerError, OSError) as error:
        return str(error)


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it never happened"
        threading.Event().wait(0.005)


def raw_connection(server, request=STATE) -> socket.socket:
    """A socket over which a client connected and sent a request, and that nobody reads."""
    protocol = ClientProtocol(parse_uri(server.uri))
    connection = socket.create_connection(("127.0.0.1", int(server.uri.rpartition(":")[2])))
    protocol.send_request(protocol.connect())
    connection.sendall(b"".join(protocol.data_to_send()))
    while protocol.state is not State.OPEN:
        protocol.receive_data(connection.recv(1 << 16))
    protocol.send_binary(pack(request))
    connection.sendall(b"".join(protocol.data_to_send()))
    return connection
