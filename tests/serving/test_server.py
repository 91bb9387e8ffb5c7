"""The server with a policy of no cost: the protocol, batches, deadlines, limits, and how it ends."""

from __future__ import annotations

import concurrent.futures
import hmac
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State
from websockets.sync.client import connect
from websockets.uri import parse_uri

from pi0_client.client import Client, ServerError
from pi0_client.msgpack_numpy import pack
from pi0_jax.serving.auth import check_free, is_authorized, tls_context
from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import Settings
from tests.serving.fake import FakePolicy, serving

TOKEN = "a-secret-of-some-length"
STATE = {"state": np.array([1.0, 2.0], np.float32)}


@pytest.fixture(scope="module")
def server():
    with serving(FakePolicy()) as server:
        yield server


def get(server, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(server.uri.replace("ws", "http", 1) + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def outcomes(server) -> dict[str, int]:
    return dict(server.metrics.outcomes)


def test_metadata_come_first_then_a_chunk_for_each_observation(server):
    with Client(server.uri) as client:
        assert client.metadata == FakePolicy().metadata
        for n in range(3):
            answer = client.infer(STATE)
            np.testing.assert_array_equal(answer["actions"], FakePolicy().answer(STATE["state"], n)["actions"])
            assert set(answer["server_timing"]) == {"infer_ms", "wait_ms"} | ({"prev_total_ms"} if n else set())
            assert answer["policy_timing"] == {"infer_ms": 0.0}


def test_an_error_is_a_text_frame_and_then_the_connection_is_closed_with_1011(server):
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
def test_what_is_no_request_is_refused_with_the_reason(server, frame, message):
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


def test_reset_is_roboarenas_and_forgets_the_session(server):
    with Client(server.uri) as client:
        first = client.infer(STATE | {"endpoint": "infer", "session_id": "x"})["actions"]
        assert (client.infer(STATE)["actions"] != first).all()
        client.reset()
        np.testing.assert_array_equal(client.infer(STATE)["actions"], first)
    with connect(server.uri) as connection:
        connection.recv()
        connection.send(pack({"endpoint": "reset", "session_id": "x"}))
        assert connection.recv() == "reset successful"


def test_health_and_readiness_are_apart_and_unknown_paths_are_told_what_there_is(server):
    assert get(server, "/healthz") == (200, "OK\n")
    assert get(server, "/ready") == (200, "ready\n")
    assert get(server, "/nowhere")[0] == 404


def test_it_compiles_before_it_listens():
    class Slow(FakePolicy):
        def warm_up(self):
            assert server._listener is None
            super().warm_up()

    policy = Slow()
    server = PolicyServer(policy, Settings(port=0))
    import asyncio

    async def run():
        async with server:
            assert policy.warm

    asyncio.run(run())


def test_pings_and_health_are_answered_during_an_inference_of_two_seconds():
    threads = concurrent.futures.ThreadPoolExecutor()
    with serving(FakePolicy(2.0)) as server, threads, connect(server.uri) as connection:
        connection.recv()
        started = time.perf_counter()
        connection.send(pack(STATE))
        answer = threads.submit(connection.recv)
        waits = []
        while not answer.done():
            begin = time.perf_counter()
            assert connection.ping().wait(1.0)
            assert get(server, "/healthz")[0] == 200
            waits.append(time.perf_counter() - begin)
            time.sleep(0.05)
        assert time.perf_counter() - started >= 2.0
        assert len(waits) > 10
        assert max(waits) < 1.0


def test_clients_share_batches_and_get_what_they_would_get_alone():
    policy = FakePolicy(0.02)
    with serving(policy, window_ms=50) as server:

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
    with serving(FakePolicy(), window_ms=5000) as server, Client(server.uri, timeout=4.0) as client:
        assert client.infer(STATE)["server_timing"]["wait_ms"] < 2000


def test_one_requests_fault_is_not_the_others(caplog):
    policy = FakePolicy(0.05)
    with serving(policy, window_ms=500) as server, concurrent.futures.ThreadPoolExecutor(4) as threads:
        clients = [Client(server.uri) for _ in range(4)]
        extras = [{}, {"crash": True}, {}, {"nan": True}]
        answers = list(threads.map(lambda c, e: _try(c, STATE | e), clients, extras))
    assert max(policy.batches) == 4
    for i in (0, 2):
        np.testing.assert_array_equal(answers[i]["actions"], policy.answer(STATE["state"], 0)["actions"])
    assert "internal error" in answers[1]
    assert "secret" not in answers[1]
    assert "not finite" in answers[3]
    assert "secret detail" in caplog.text  # the log has what the client may not see, under the number that it got
    assert {r.error for r in caplog.records if hasattr(r, "error")} >= {answers[1][-13:-1]}


def _try(client: Client, request: dict):
    try:
        return client.infer(request)
    except (ServerError, OSError) as error:
        return str(error)


def test_requests_beyond_the_queue_are_refused_at_once_and_may_come_again():
    with serving(FakePolicy(0.5), max_waiting=1) as server, concurrent.futures.ThreadPoolExecutor(4) as threads:
        clients = [Client(server.uri) for _ in range(3)]
        running = threads.submit(_try, clients[0], STATE)
        _until(lambda: server.computing)
        waiting = threads.submit(_try, clients[1], STATE)
        _until(lambda: server.state == "busy")
        assert get(server, "/ready") == (503, "busy\n")
        with pytest.raises(ServerError, match="1 requests wait already") as refused:
            clients[2].infer(STATE)
        assert refused.value.retry
        assert "actions" in running.result()
        assert "actions" in waiting.result()
        assert "actions" in clients[2].infer(STATE)  # over a new connection


def test_a_request_past_its_deadline_is_refused_and_its_answer_never_sent():
    with serving(FakePolicy(0.4), deadline=0.1) as server, connect(server.uri) as connection:
        connection.recv()
        connection.send(pack(STATE))
        assert "deadline of 0.1 s" in connection.recv()
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1013


def test_draining_answers_what_runs_and_refuses_the_rest():
    with serving(FakePolicy(0.5)) as server, concurrent.futures.ThreadPoolExecutor() as threads:
        client, idle = Client(server.uri), Client(server.uri)
        answer = threads.submit(client.infer, STATE)
        _until(lambda: server.computing)
        stopping = threads.submit(server.call, server.stop())
        _until(lambda: server.state == "stopping")
        with pytest.raises((ServerError, OSError)):
            idle.infer(STATE)
        assert "actions" in answer.result()
        stopping.result()
        with pytest.raises(OSError, match=r"nobody listens|reset|closed"):
            Client(server.uri)


@pytest.mark.parametrize(("seconds", "code"), [(1.0, 0), (60.0, 1)], ids=["drains", "does not wait for ever"])
def test_sigterm_drains_and_ends_the_process(seconds, code):
    program = f"""
import asyncio
from pi0_jax.serving.commands import run_until_signal
from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import Settings
from tests.serving.fake import FakePolicy
asyncio.run(run_until_signal(PolicyServer(FakePolicy({seconds}), Settings(port=0, drain=2.0))))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        with Client(process.stdout.readline().split()[1]) as client, concurrent.futures.ThreadPoolExecutor() as threads:
            answer = threads.submit(_try, client, STATE)
            time.sleep(0.2)
            process.terminate()
            assert ("actions" in answer.result()) == (code == 0)
        assert process.wait(15) == code
    finally:
        process.kill()
        process.communicate()


def test_nothing_is_sent_after_stop():
    with serving(FakePolicy(0.6), drain=0.1) as server, connect(server.uri) as connection:
        connection.recv()
        connection.send(pack(STATE))
        _until(lambda: server.computing)
        server.call(server.stop())
        time.sleep(0.8)  # the policy's answer is there by now
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
        _until(lambda: server._clients == 0 and not server._in_progress)
        with Client(server.uri) as client:
            assert "actions" in client.infer(STATE)
        assert server._batcher.waiting == 0


def test_half_open_sockets_and_slow_readers_do_not_hold_up_others():
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
            _until(lambda: outcomes(server) == {"ok": 20, "gone": 1})
        for each in (*half_open, slow):
            each.close()


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


def test_the_token_is_demanded_and_health_is_not_behind_it():
    with serving(FakePolicy(), token=TOKEN) as server:
        for token in (None, "wrong", TOKEN[:-1], "é" * 20):
            with pytest.raises((ServerError, UnicodeError)):
                Client(server.uri, token)
        with Client(server.uri, TOKEN) as client:
            assert "actions" in client.infer(STATE)
        assert get(server, "/healthz")[0] == get(server, "/ready")[0] == 200
        assert get(server, "/")[0] == get(server, "/metrics")[0] == 401
        assert get(server, "/", Authorization=f"Api-Key {TOKEN}")[0] == 200
        basic = "Basic " + __import__("base64").b64encode(f"me:{TOKEN}".encode()).decode()
        assert get(server, "/metrics", Authorization=basic)[0] == 200


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))) or a == b)
    assert is_authorized(f"Api-Key {TOKEN}", TOKEN)
    assert not is_authorized(None, TOKEN)
    assert not is_authorized(f"Bearer {TOKEN}", TOKEN)
    assert [pair[1] for pair in compared] == [TOKEN.encode()] * 3  # also where nothing could be right


def test_by_default_it_listens_for_this_machine_alone(server):
    assert Settings().host == "127.0.0.1"
    assert {socket_.getsockname()[0] for socket_ in server._listener.sockets} == {"127.0.0.1"}


def test_a_network_is_served_with_a_token_or_an_explicit_wish_only():
    with pytest.raises(ValueError, match=r"on 0\.0\.0\.0 everybody.*--insecure"):
        PolicyServer(FakePolicy(), Settings(host="0.0.0.0"))
    for host in ("", "::", "192.168.0.3", "robot.local"):
        with pytest.raises(ValueError, match="Set a token"):
            PolicyServer(FakePolicy(), Settings(host=host))
    PolicyServer(FakePolicy(), Settings(host="0.0.0.0"), token=TOKEN)
    PolicyServer(FakePolicy(), Settings(host="0.0.0.0", insecure=True))
    PolicyServer(FakePolicy(), Settings(host="::1"))


def test_pages_of_others_can_neither_drive_the_policy_nor_read_its_page(server):
    with pytest.raises(Exception, match="403"):
        connect(server.uri, origin="https://elsewhere.example")
    assert get(server, "/", Host="elsewhere.example:8000")[0] == 403
    assert get(server, "/", Host="localhost:8000")[0] == 200


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


def test_connections_are_limited():
    with serving(FakePolicy(), max_connections=2) as server:
        first, second = Client(server.uri), Client(server.uri)
        with pytest.raises(ServerError, match="2 clients are connected") as refused:
            Client(server.uri)
        assert refused.value.retry
        first.close()
        _until(lambda: server._clients == 1)
        Client(server.uri).close()
        second.close()


def test_tls(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey ed25519 -keyout {key} -out {certificate} -days 1 -nodes -subj /CN=localhost "
    command += "-addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    with pytest.raises(ValueError, match="both"):
        tls_context(certificate, None)
    with pytest.raises(ValueError, match="not a certificate and its key"):
        tls_context(key, key)
    with serving(FakePolicy(), tls=tls_context(certificate, key)) as server:
        assert server.uri.startswith("wss://")
        with Client(server.uri, tls=ssl.create_default_context(cafile=str(certificate))) as client:
            assert "actions" in client.infer(STATE)
        with pytest.raises(ssl.SSLError):
            Client(server.uri)


def test_metrics_count_what_happened():
    with serving(FakePolicy()) as server:
        with Client(server.uri) as client:
            for _ in range(3):
                client.infer(STATE)
            assert _try(client, {"state": [1]}).startswith("invalid:")
        text = get(server, "/metrics")[1]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['pi0_requests_total{outcome="ok"}']) == 3
    assert float(values['pi0_requests_total{outcome="invalid"}']) == 1
    assert float(values["pi0_request_seconds_count"]) == 3
    assert float(values['pi0_batch_size_bucket{le="1.0"}']) == 3


def test_the_client_loads_nothing_heavy():
    code = "import sys, pi0_client.client; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "msgpack", "websockets"} <= set(loaded)
    assert not {"jax", "flax", "scipy", "matplotlib", "prometheus_client", "PIL", "pyarrow"} & set(loaded)


def test_the_client_gives_up_on_a_silent_server_and_takes_no_late_answer():
    with serving(FakePolicy(0.6)) as server:
        client = Client(server.uri, timeout=0.3)
        with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
            client.infer({"state": np.array([5.0, 5.0])})
        client._timeout = 5
        np.testing.assert_array_equal(client.infer(STATE)["actions"], FakePolicy().answer(STATE["state"], 0)["actions"])
        client.close()


def test_log_lines_are_json_and_strangers_do_not_break_them():
    from pi0_jax.serving.logs import JsonLines, Text

    record = logging.LogRecord("pi0_jax.serving", logging.WARNING, "", 0, "bad\nline %s", ("x",), None)
    record.session, record.error = "abc", "1"
    assert json.loads(JsonLines().format(record))["session"] == "abc"
    assert "\n" not in Text().format(record)
    assert "\n" not in JsonLines().format(record)


def test_addresses_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"--port is 99999; expected 1 to 65535"):
        check_free("127.0.0.1", 99_999)
    with pytest.raises(ValueError, match=r"'localhost:8000' is not a server's address; expected ws://"):
        Client("localhost:8000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match=f"nobody listens at ws://127.0.0.1:{port}"):
        Client(f"ws://127.0.0.1:{port}")


def test_a_log_that_nobody_reads_holds_nobody_up_and_says_later_what_it_dropped():
    from pi0_jax.serving.logs import BackgroundHandler, JsonLines

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


def _until(condition, seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it never happened"
        threading.Event().wait(0.005)
