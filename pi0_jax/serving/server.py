"""The policy server: openpi's WebSocket protocol, guarded, batched and watched.

A client connects and is told about the policy in one binary frame. It sends observations, one binary frame each, and
gets one back with a chunk of actions. An error is a text frame, after which the connection is closed. `GET /healthz`
says whether the process lives and `/ready` whether it takes requests; `/` is a page for people and `/metrics` is for
Prometheus.

The event loop only moves bytes: observations are checked in threads, and the policy runs in threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http
import logging
import ssl
import time
import uuid
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from pi0_jax.serving import status_page
from pi0_jax.serving.auth import check_address, is_authorized, is_loopback
from pi0_jax.serving.backend import Served
from pi0_jax.serving.batcher import Batcher, Refused, Stopping
from pi0_jax.serving.metrics import Metrics
from pi0_jax.serving.msgpack_numpy import Limits, WireError, pack, unpack
from pi0_jax.serving.session import Session

log = logging.getLogger(__name__)

ERROR, AGAIN, AWAY = 1011, 1013, 1001
"""Codes with which a connection is closed: after an error, after one that another try may not meet, and at the end."""
_RESET = object()
MAX_MESSAGE = 2000
"""Characters of an error that a client is told."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to serve. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    token: str | None = None
    insecure: bool = False
    """Serve a network without a token."""
    tls: ssl.SSLContext | None = None
    window: float = 0.005
    """How long a request may wait for others to share its batch; 0: batches form only while another is computed."""
    max_waiting: int = 256
    """Requests that may wait; one more is refused."""
    max_connections: int = 256
    deadline: float = 10.0
    """From a request's arrival to its answer; later ones are refused."""
    send_timeout: float = 10.0
    """Within which a client has to take its answer."""
    drain: float = 10.0
    """How long `stop` waits for requests that are being answered."""
    limits: Limits = dataclasses.field(default_factory=Limits)


class PolicyServer:
    """Serves one policy. Use it as `async with`, or call `start` and `stop`.

    Args:
        policy: what answers.
        settings: how to serve.

    Raises:
        ValueError: it would serve a network without a token.
    """

    def __init__(self, policy: Served, settings: Settings | None = None):
        self.settings = settings or Settings()
        check_address(self.settings.host, self.settings.token, self.settings.insecure)
        self.policy, self.metrics = policy, Metrics()
        self._hello = pack(policy.metadata)
        self._batcher = Batcher(
            policy,
            window=self.settings.window,
            max_waiting=self.settings.max_waiting,
            deadline=self.settings.deadline,
            clients=lambda: self._clients,
            metrics=self.metrics,
        )
        self._clients = self._answering = 0
        self._stopping = self._silent = False
        self._listener: Listener | None = None
        self.uri = ""
        """Where it listens, once it was started."""
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Compiles the policy's programs, and then listens.

        Raises:
            OSError: the address is taken, or not this machine's.
        """
        await asyncio.to_thread(self.policy.warm_up)
        self._spawn(self._batcher.run())
        settings = self.settings
        self._listener = await serve(
            self._talk,
            settings.host,
            settings.port,
            ssl=settings.tls,
            process_request=self._respond,
            origins=[None],  # no page in a browser may talk to a robot's policy
            compression=None,
            max_size=settings.limits.frame_bytes,
            max_queue=2,
            server_header=None,
            logger=_QUIET,
        )
        host, port = next(iter(self._listener.sockets)).getsockname()[:2]
        self.uri = f"{'wss' if settings.tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("serving %s at %s", self.policy.metadata.get("robot", "a policy"), self.uri)

    @property
    def state(self) -> str:
        """stopping; busy, where another request would be refused; or ready."""
        if self._stopping:
            return "stopping"
        return "busy" if self._batcher.waiting >= self.settings.max_waiting else "ready"

    @property
    def computing(self) -> int:
        """How many requests the policy computes at this moment."""
        return self._batcher.computing

    async def stop(self, drain: bool = True) -> None:
        """Takes no more requests, answers those that it has, and closes. After this nothing is sent.

        Args:
            drain: False: answers nothing more either.
        """
        self._stopping = True
        if self._listener is None:
            return
        self._listener.close(close_connections=False)
        end = time.perf_counter() + self.settings.drain
        while drain and self._answering and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self._silent = True
        if self._answering:
            log.warning("%d requests are not answered", self._answering)
        for task in self._tasks:
            task.cancel()
        connections = list(self._listener.connections)
        await asyncio.gather(*(self._close(connection, AWAY, "the server stops") for connection in connections))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._listener.wait_closed(), 2.0)
        self._batcher.close()
        log.info("stopped")

    async def __aenter__(self) -> PolicyServer:
        await self.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()

    async def _talk(self, connection: ServerConnection) -> None:
        """One client, from hello to goodbye."""
        session = Session(uuid.uuid4().hex[:12])
        self._clients += 1
        self.metrics.connected.inc()
        self.metrics.connections.set(self._clients)
        log.info("client connected", extra={"session": session.name, "peer": _peer(connection)})
        try:
            await self._send(connection, self._hello)
            previous = None
            async for frame in connection:
                start = time.perf_counter()
                if not await self._exchange(connection, session, frame, start, previous):
                    break
                previous = time.perf_counter() - start
        except (ConnectionClosed, ConnectionAbortedError):
            pass
        finally:
            self._clients -= 1
            self.metrics.connections.set(self._clients)
            log.info("client left", extra={"session": session.name, "answered": session.answered})

    async def _exchange(
        self, connection: ServerConnection, session: Session, frame: str | bytes, start: float, previous: float | None
    ) -> bool:
        """Answers one frame; False if the connection is over. `previous` is how long the last one took, in seconds."""
        self._answering += 1
        answering = self._spawn(self._answer(frame, session, start, previous))
        gone = self._spawn(connection.wait_closed())
        outcome, seconds = "gone", None
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return False
            await self._send(connection, answering.result())
            outcome, seconds = "ok", time.perf_counter() - start
            return True
        except (ConnectionClosed, ConnectionAbortedError):
            return False
        except asyncio.CancelledError:
            outcome = "stopping"
            if not self._silent:
                raise
            return False
        except Exception as error:
            outcome = await self._fail(connection, session, error)
            return False
        finally:
            answering.cancel()
            gone.cancel()
            self._answering -= 1
            self.metrics.saw_request(outcome, seconds)

    async def _answer(self, frame: str | bytes, session: Session, start: float, previous: float | None) -> str | bytes:
        """The frame to send for one that came."""
        if self._stopping:
            raise Stopping("the server is stopping.")
        if isinstance(frame, str):
            raise WireError("a text frame came; requests are binary frames of msgpack.")
        observation = await asyncio.to_thread(self._read, frame)
        if observation is _RESET:
            session.reset()
            return "reset successful"
        answer = await self._batcher.infer(observation, session, start)
        session.answered += 1
        self.metrics.last = (observation, answer["actions"])
        timing = answer["server_timing"] | ({} if previous is None else {"prev_total_ms": 1000 * previous})
        return pack(answer | {"server_timing": timing})

    def _read(self, frame: bytes) -> Any:
        """What the policy takes, from a frame; or that it asks for a reset, as RoboArena's clients do."""
        request = unpack(frame, self.settings.limits)
        endpoint = request.pop("endpoint", "infer") if isinstance(request, dict) else "infer"
        if isinstance(endpoint, str) and endpoint == "reset":
            return _RESET
        if not isinstance(endpoint, str) or endpoint != "infer":
            raise WireError(f"there is no endpoint {str(endpoint)[:40]!r}; there are infer and reset.")
        try:
            return self.policy.prepare(request)
        except (ValueError, TypeError) as error:
            raise Refused(str(error)) from error

    async def _send(self, connection: ServerConnection, frame: str | bytes) -> None:
        """Sends, unless the server is silent; ends the connection of a client that does not read.

        Raises:
            ConnectionClosed: the client is gone.
            ConnectionAbortedError: it did not read, and is gone now.
        """
        if self._silent:
            raise asyncio.CancelledError
        try:
            async with asyncio.timeout(self.settings.send_timeout):
                await connection.send(frame)
        except TimeoutError:
            log.warning("a client does not read its answers", extra={"peer": _peer(connection)})
            connection.transport.abort()
            raise ConnectionAbortedError from None

    async def _fail(self, connection: ServerConnection, session: Session, error: Exception) -> str:
        """Tells the client what went wrong, as much as it may know, and closes; returns the word for it."""
        name = uuid.uuid4().hex[:12]
        known = isinstance(error, (Refused, WireError))
        outcome = error.outcome if isinstance(error, Refused) else "invalid" if known else "failed"
        where = {"session": session.name, "peer": _peer(connection), "error": name, "outcome": outcome}
        if known:
            log.warning("request refused: %s", str(error)[:MAX_MESSAGE], extra=where)
        else:
            log.error("request failed", exc_info=error, extra=where)
        told = str(error)[:MAX_MESSAGE] if known else "internal error; the server's log has it under this number."
        with contextlib.suppress(ConnectionClosed, ConnectionAbortedError, asyncio.CancelledError):
            await self._send(connection, f"{outcome}: {told} [{name}]")
            await self._close(connection, AGAIN if outcome in ("busy", "late") else ERROR, "error in previous frame")
        return outcome

    async def _close(self, connection: ServerConnection, code: int, reason: str) -> None:
        """Closes a connection, by force if the client does not answer."""
        try:
            async with asyncio.timeout(2.0):
                await connection.close(code, reason)
        except TimeoutError:
            connection.transport.abort()

    async def _respond(self, connection: ServerConnection, request: Request) -> Response | None:
        """What a handshake or a plain HTTP request gets; None: a WebSocket connection."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/ready":
            ready = self.state == "ready"
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, f"{self.state}\n")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return self._refuse(connection, request)
        if path not in ("/", "/metrics"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there are /, /metrics, /healthz and /ready.\n")
        return self._guard_page(connection, request) or await self._page(connection, path)

    def _refuse(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer to a client that may not connect; None: it may."""
        if self._stopping:
            reason, status, text = "stopping", http.HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping.\n"
        elif not self._has_token(request):
            reason, status, text = "token", http.HTTPStatus.UNAUTHORIZED, "send Authorization: Api-Key TOKEN.\n"
        elif self._clients >= self.settings.max_connections:
            reason, status = "connections", http.HTTPStatus.SERVICE_UNAVAILABLE
            text = f"{self._clients} clients are connected, and that is the limit.\n"
        else:
            return None
        self.metrics.refused.labels(reason).inc()
        log.warning("client turned away: %s", text.strip(), extra={"peer": _peer(connection)})
        return connection.respond(status, text)

    def _guard_page(self, connection: ServerConnection, request: Request) -> Response | None:
        """Pages show cameras. With a token they are for those who have it, without one for this machine alone."""
        if self.settings.token is not None:
            if self._has_token(request):
                return None
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "log in with any name and the token.\n")
            response.headers["WWW-Authenticate"] = 'Basic realm="pi0", charset="UTF-8"'
            return response
        host = request.headers.get("Host", "").rpartition(":")[0] or request.headers.get("Host", "")
        peer = connection.remote_address
        # The name is checked too: a page elsewhere may have its own resolve to this machine.
        if peer and is_loopback(peer[0]) and is_loopback(host.strip("[]")):
            return None
        return connection.respond(http.HTTPStatus.FORBIDDEN, "only from this machine, as localhost; or set a token.\n")

    def _has_token(self, request: Request) -> bool:
        token = self.settings.token
        return token is None or is_authorized(request.headers.get("Authorization"), token)

    async def _page(self, connection: ServerConnection, path: str) -> Response:
        if path == "/metrics":
            return _response(connection, generate_latest(self.metrics.registry), {"Content-Type": CONTENT_TYPE_LATEST})
        numbers = (self.state, self.policy.metadata, self.metrics, self._clients, self._batcher.waiting)
        text = await asyncio.to_thread(status_page.render, *numbers)
        return _response(connection, text.encode(), status_page.HEADERS)

    def _spawn(self, work) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


_QUIET = logging.getLogger(f"{__name__}.websockets")
_QUIET.setLevel(logging.CRITICAL)  # what it says is said here already, or is a stranger's noise


def _response(connection: ServerConnection, body: bytes, headers: dict[str, str]) -> Response:
    response = connection.respond(http.HTTPStatus.OK, "")
    for name in ("Content-Type", "Content-Length"):
        del response.headers[name]
    response.headers.update(headers | {"Content-Length": str(len(body))})
    return dataclasses.replace(response, body=body)


def _peer(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if address else "gone"
