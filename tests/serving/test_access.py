"""Who may connect to the server, and who may see its pages."""

from __future__ import annotations

import base64
import hmac
import ssl
import subprocess

import pytest
from websockets.sync.client import connect

from pi0_client.client import Client, ServerError
from pi0_jax.serving.auth import check_free, is_authorized, tls_context
from pi0_jax.serving.server import PolicyServer
from pi0_jax.serving.settings import Settings
from tests.serving.fake import STATE, FakePolicy, get, serving, wait_until

TOKEN = "a-secret-of-some-length"


@pytest.fixture(scope="module")
def server():
    with serving(FakePolicy()) as server:
        yield server


def test_the_token_is_demanded_except_for_health():
    with serving(FakePolicy(), token=TOKEN) as server:
        for token in (None, "wrong", TOKEN[:-1], "é" * 20):
            with pytest.raises((ServerError, UnicodeError)):
                Client(server.uri, token)
        with Client(server.uri, TOKEN) as client:
            assert "actions" in client.infer(STATE)
        assert get(server, "/healthz")[0] == get(server, "/ready")[0] == 200
        assert get(server, "/")[0] == get(server, "/metrics")[0] == 401
        assert get(server, "/", Authorization=f"Api-Key {TOKEN}")[0] == 200
        basic = "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()
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


def test_a_network_is_served_only_with_a_token_or_insecure():
    with pytest.raises(ValueError, match=r"on 0\.0\.0\.0 everybody.*--insecure"):
        PolicyServer(FakePolicy(), Settings(host="0.0.0.0"))
    for host in ("", "::", "192.168.0.3", "robot.local"):
        with pytest.raises(ValueError, match="Set a token"):
            PolicyServer(FakePolicy(), Settings(host=host))
    PolicyServer(FakePolicy(), Settings(host="0.0.0.0"), token=TOKEN)
    PolicyServer(FakePolicy(), Settings(host="0.0.0.0", insecure=True))
    PolicyServer(FakePolicy(), Settings(host="::1"))


def test_other_sites_can_neither_connect_nor_read_the_status_page(server):
    with pytest.raises(Exception, match="403"):
        connect(server.uri, origin="https://elsewhere.example")
    assert get(server, "/", Host="elsewhere.example:8000")[0] == 403
    assert get(server, "/", Host="localhost:8000")[0] == 200


def test_connections_are_limited():
    with serving(FakePolicy(), max_connections=2) as server:
        first, second = Client(server.uri), Client(server.uri)
        with pytest.raises(ServerError, match="2 clients are connected") as refused:
            Client(server.uri)
        assert refused.value.retry
        first.close()
        wait_until(lambda: server._clients == 1)
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


def test_impossible_ports_are_named():
    with pytest.raises(ValueError, match=r"--port is 99999; expected 1 to 65535"):
        check_free("127.0.0.1", 99_999)
