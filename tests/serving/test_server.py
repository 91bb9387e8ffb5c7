"""The server with a policy of no cost: the protocol, batches, deadlines, monitoring, and how it ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from pi0_client.client import Client, ServerError
from pi0_client.msgpack_numpy import pack
from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import Settings
from tests.serving.fake import STATE, FakePolicy, attempt, get, raw_connection, serving, wait_until


@pytest.fixture(scope="module")
def server():
    with serving(FakePolicy()) as server:
        yield server


def outcomes(server) -> dict[str, int]:
    return dict(server.metrics.outcomes)


def test_metadata_come_first_then_one_chunk_per_observation(server):
    with Client(server.uri) as client:
        assert client.metadata == FakePolicy().metadata
        for n in range(3):
            answer = client.infer(STATE)
            np.testing.assert_array_equal(answer["actions"], FakePolicy().answer(STATE["state"], n)["actions"])
            assert set(answer["server_timing"]) == {"infer_ms", "wait_ms"} | ({"prev_total_ms"} if n else set())
            assert answer["policy_timing"] == {"infer_ms": 0.0}


def test_an_error_is_a_text_frame_then_the_connection_closes_with_1011(server):
    with connect(server.uri) as connection:
        connection.recv()
        connection.send(pack({"state": np.zeros(3)}))
        message = connection.recv()
        assert isinstance(message, str)
        assert "`state` has shape (3,)" in message
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1011


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"\xc1", "cannot be decoded: FormatError"),
        ("text", "text frame"),
        (pack([1]), "lacks"),
        (pack({"endpoint": "x"}), "no endpoint"),
    ],
)
def test_invalid_requests_are_refused_with_the_reason(server, frame, message):
    with connect(server.uri) as connection:
        connection.recv()
        connection.send(frame)
        assert message in connection.recv()


def test_a_frame_over_the_limit_is_not_read():
    with serving(FakePolicy(), max_frame_mb=0.001) as server, connect(server.uri) as connection:
        connection.recv()
        connection.send(b"\0" * 2000)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1009


def test_reset_is_roboarenas_and_resets_the_session(server):
    with Client(server.uri) as client:
        first = client.infer(STATE | {"endpoint": "infer", "session_id": "x"})["actions"]
        assert (client.infer(STATE)["actions"] != first).all()
        client.reset()
        np.testing.assert_array_equal(client.infer(STATE)["actions"], first)
    with connect(server.uri) as connection:
        connection.recv()
        connection.send(pack({"endpoint": "reset", "session_id": "x"}))
        assert connection.recv() == "reset successful"


def test_health_and_readiness_differ_and_unknown_paths_get_404(server):
    assert get(server, "/healthz") == (200, "OK\n")
    assert get(server, "/ready") == (200, "ready\n")
    assert get(server, "/nowhere")[0] == 404


def test_it_compiles_before_it_listens():
    class Slow(FakePolicy):
        def warm_up(self):
            assert server._listener is None
            return super().warm_up()

    policy = Slow()
    server = PolicyServer(policy, Settings(port=0))

    async def run():
        async with server:
            assert policy.warm

    asyncio.run(run())


def test_pings_and_health_are_answered_during_an_inference():
    gate = threading.Event()
    with serving(FakePolicy(gate=gate)) as server, ThreadPoolExecutor() as threads, connect(server.uri) as connection:
        connection.recv()
        connection.send(pack(STATE))
        answer = threads.submit(connection.recv)
        wait_until(lambda: server.computing)
        for _ in range(12):
            begin = time.perf_counter()
            assert connection.ping().wait(1.0)
            assert get(server, "/healthz")[0] == 200
            assert time.perf_counter() - begin < 1.0
            assert not answer.done()
        gate.set()
        assert isinstance(answer.result(), bytes)


def test_clients_share_batches_and_get_what_they_would_get_alone():
    policy = FakePolicy(0.02)
    with serving(policy, window_ms=50.0) as server:

        def drive(n: int) -> bool:
            state = np.array([n, -n], np.float32)
            with Client(server.uri) as client:
                got = [client.infer({"state": state})["actions"] for _ in range(3)]
            return all((a == policy.answer(state, i)["actions"]).all() for i, a in enumerate(got))

        with concurrent.futures.ThreadPoolExecutor(64) as threads:
            assert all(threads.map(drive, range(64)))
    assert sum(policy.batches) == 192
    assert max(policy.batches) == policy.batch_sizes[-1]
    assert len(policy.batches) < 96


def test_one_client_alone_does_not_wait_for_the_window():
    with serving(FakePolicy(), window_ms=5000.0) as server, Client(server.uri, timeout=4.0) as client:
        assert client.infer(STATE)["server_timing"]["wait_ms"] < 2000


def test_failures_of_requests_in_one_batch_are_isolated(caplog):
    policy = FakePolicy(0.05)
    with serving(policy, window_ms=500.0) as server, concurrent.futures.ThreadPoolExecutor(4) as threads:
        clients = [Client(server.uri) for _ in range(4)]
        extras = [{}, {"crash": True}, {}, {"nan": True}]
        answers = list(threads.map(lambda c, e: attempt(c, STATE | e), clients, extras))
    assert max(policy.batches) == 4
    for i in (0, 2):
        np.testing.assert_array_equal(answers[i]["actions"], policy.answer(STATE["state"], 0)["actions"])
    assert "internal error" in answers[1]
    assert "secret" not in answers[1]
    assert "not finite" in answers[3]
    assert "secret detail" in caplog.text  # the log has what the client may not see, under the number that it got
    assert {r.error for r in caplog.records if hasattr(r, "error")} >= {answers[1][-13:-1]}


def test_an_answer_that_cannot_be_sent_is_the_servers_fault(monkeypatch):
    policy = FakePolicy()
    monkeypatch.setattr(policy, "answer", lambda *_: {"actions": np.zeros((3, 2)), "policy_timing": {"who": object()}})
    with serving(policy) as server:
        assert "internal error" in attempt(Client(server.uri), STATE)
        assert 'outcome="failed"} 1' in get(server, "/metrics")[1]


def test_requests_beyond_the_queue_are_refused_and_may_be_retried():
    gate = threading.Event()
    with serving(FakePolicy(gate=gate), max_waiting=1) as server, concurrent.futures.ThreadPoolExecutor(4) as threads:
        clients = [Client(server.uri) for _ in range(3)]
        running = threads.submit(attempt, clients[0], STATE)
        wait_until(lambda: server.computing)
        waiting = threads.submit(attempt, clients[1], STATE)
        wait_until(lambda: server.state == "busy")
        assert get(server, "/ready") == (503, "busy\n")
        with pytest.raises(ServerError, match="1 requests wait already") as refused:
            clients[2].infer(STATE)
        assert refused.value.retry
        gate.set()
        assert "actions" in running.result()
        assert "actions" in waiting.result()
        assert "actions" in clients[2].infer(STATE)  # over a new connection


def test_a_request_past_its_deadline_is_refused_and_never_answered():
    with serving(FakePolicy(0.4), deadline=0.1) as server, connect(server.uri) as connection:
        connection.recv()
        connection.send(pack(STATE))
        assert "deadline of 0.1 s" in connection.recv()
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1013


def test_draining_answers_requests_in_progress_and_refuses_others():
    gate = threading.Event()
    with serving(FakePolicy(gate=gate)) as server, concurrent.futures.ThreadPoolExecutor() as threads:
        client, idle = Client(server.uri), Client(server.uri)
        answer = threads.submit(client.infer, STATE)
        wait_until(lambda: server.computing)
        stopping = threads.submit(server.call, server.stop())
        wait_until(lambda: server.state == "stopping")
        with pytest.raises((ServerError, OSError)):
            idle.infer(STATE)
        gate.set()
        assert "actions" in answer.result()
        stopping.result()
        with pytest.raises(OSError, match=r"nobody listens|reset|closed"):
            Client(server.uri)


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 0), (60.0, 1)], ids=["drains", "does not wait forever"])
def test_sigterm_drains_and_ends_the_process(seconds, code):
    drain = 0.3 if code else 5.0
    program = f"""
import asyncio
from pi0_jax.serving.commands import run_until_signal
from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import Settings
from tests.serving.fake import FakePolicy
asyncio.run(run_until_signal(PolicyServer(FakePolicy({seconds}), Settings(port=0, drain={drain}))))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        with Client(process.stdout.readline().split()[1]) as client, concurrent.futures.ThreadPoolExecutor() as threads:
            answer = threads.submit(attempt, client, STATE)
            time.sleep(0.2)
            process.terminate()
            assert ("actions" in answer.result()) == (code == 0)
        assert process.wait(15) == code
    finally:
        process.kill()
        process.communicate()


def test_nothing_is_sent_after_stop():
    gate = threading.Event()
    with serving(FakePolicy(gate=gate), drain=0.1) as server, connect(server.uri) as connection:
        connection.recv()
        connection.send(pack(STATE))
        wait_until(lambda: server.computing)
        server.call(server.stop())
        gate.set()
        wait_until(lambda: not server.computing)  # the policy's answer is there
        time.sleep(0.1)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=1)
        assert closed.value.rcvd.code == 1001
        assert "ok" not in outcomes(server)


def test_clients_that_vanish_leave_nothing_behind():
    policy = FakePolicy(0.05)
    with serving(policy) as server:
        for _ in range(20):
            connection = raw_connection(server)
            connection.close()
        wait_until(lambda: server._clients == 0 and not server._in_progress)
        with Client(server.uri) as client:
            assert "actions" in client.infer(STATE)
        assert server._batcher.waiting == 0


def test_half_open_sockets_and_slow_readers_delay_nobody():
    class Big(FakePolicy):
        def answer(self, state, answered, nan=False):
            return (
                {"actions": np.zeros((2_000_000, 2), np.float32)} if state[0] == 9 else super().answer(state, answered)
            )

    with serving(Big(), send_timeout=0.5) as server:
        address = ("127.0.0.1", int(server.uri.rpartition(":")[2]))
        half_open = [socket.create_connection(address) for _ in range(50)]
        half_open[0].sendall(b"GET / HTTP/1.1\r\nHost:")
        slow = raw_connection(server, {"state": np.array([9.0, 0.0])})
        with Client(server.uri) as client:
            for _ in range(20):
                client.infer(STATE)
            wait_until(lambda: outcomes(server) == {"ok": 20, "gone": 1})
        for each in (*half_open, slow):
            each.close()


def test_a_browser_shows_the_page():
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    with serving(FakePolicy()) as server, Client(server.uri) as client:
        for _ in range(3):
            client.infer(STATE | {"images": {"top": np.zeros((4, 4, 3), np.uint8)}, "prompt": "<script>x</script>"})
        uri = server.uri.replace("ws", "http", 1) + "/"
        page = subprocess.run([*command, uri], capture_output=True, text=True, timeout=120).stdout
    assert "<th>state</th><td>ready</td>" in page
    assert page.count("<svg") == 3  # latencies, batches, the last chunk
    assert page.count("<img") == 1
    assert "&lt;script&gt;x" in page
    assert "<script" not in page


def test_metrics_count_requests_and_batches():
    with serving(FakePolicy()) as server:
        with Client(server.uri) as client:
            for _ in range(3):
                client.infer(STATE)
            assert attempt(client, {"state": [1]}).startswith("invalid:")
        text = get(server, "/metrics")[1]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['pi0_requests_total{outcome="ok"}']) == 3
    assert float(values['pi0_requests_total{outcome="invalid"}']) == 1
    assert float(values["pi0_request_seconds_count"]) == 3
    assert float(values['pi0_batch_size_bucket{le="1.0"}']) == 3
