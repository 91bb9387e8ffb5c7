"""The client, against a server with a policy of no cost."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from pi0_client.client import Client
from tests.serving.fake import STATE, FakePolicy, serving


def test_the_client_loads_nothing_heavy():
    code = "import sys, pi0_client.client, pi0_client.executor; print(*{n.partition('.')[0] for n in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "msgpack", "websockets"} <= set(loaded)
    assert not {"pi0_jax", "jax", "flax", "scipy", "matplotlib", "prometheus_client", "PIL", "pyarrow"} & set(loaded)


def test_the_client_times_out_and_ignores_late_answers():
    gate = threading.Event()
    with serving(FakePolicy(gate=gate)) as server:
        client = Client(server.uri, timeout=0.2)
        with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
            client.infer({"state": np.array([5.0, 5.0])})
        gate.set()
        client._timeout = 5
        np.testing.assert_array_equal(client.infer(STATE)["actions"], FakePolicy().answer(STATE["state"], 0)["actions"])
        client.close()


def test_addresses_without_a_server_are_named():
    with pytest.raises(ValueError, match=r"'localhost:8000' is not a server's address; expected ws://"):
        Client("localhost:8000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match=f"nobody listens at ws://127.0.0.1:{port}"):
        Client(f"ws://127.0.0.1:{port}")
