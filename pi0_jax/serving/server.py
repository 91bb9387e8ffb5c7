"""The policy server: openpi's WebSocket protocol, with authentication, batching and monitoring.

A client connects and receives the policy's metadata in one binary frame. It sends observations, one binary frame each,
and receives one with a chunk of actions. An error is a text frame, after which the connection is closed.
`GET /healthz` says whether the process lives and `/ready` whether it accepts requests; `/` is the status page and
`/metrics` is for Prometheus.

The event loop only moves bytes: observations are checked in threads, and the policy runs in threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import ssl
import time
import uuid
from collections.abc import Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from pi0_client.msgpack_numpy import WireError, pack, unpack
from pi0_jax.serving import status_page
from pi0_jax.serving.auth import check_address, is_authorized, is_loopback
from pi0_jax.serving.backend import PolicyBackend, Session
from pi0_jax.serving.batcher import Batcher, Refused
from pi0_jax.serving.metrics import Metrics
from pi0_jax.serving.settings import Settings, choose_deadline

log = logging.getLogger(__name__)

ERROR, RETRY, GOING_AWAY = 1011, 1013, 1001
"""Codes with which a connection is closed: after an error, after one that a retry may not meet, and at the end."""
_RESET = object()
MAX_MESSAGE = 2000
"""Characters of an error message that a client receives."""


class PolicyServer:
    """Serves one policy. Use it as `async with`, or call `start` and `stop`.

    Args:
        policy: computes the answers.
        settings: address, batching and limits.
        token: the secret that clients have to send; None demands none.
        tls: context for `wss`; None serves `ws`.

    Raises:
        UserError: it would serve a network without a token.
    """

    def __init__(
        self,
        policy: PolicyBackend,
        settings: Settings | None = None,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ):
        self.settings, self._token, self._tls = settings or Settings(), token, tls
        check_address(self.settings.host, token, self.settings.insecure)
        self.policy, self.metrics = policy, Metrics()
        self._greeting = pack(policy.metadata)
        self._batcher = Batcher(
            policy,
            window=self.settings.window_ms / 1000,
            max_waiting=self.settings.max_waiting,
            clients=lambda: self._clients,
            metrics=self.metrics,
        )
        self._clients = self._in_progress = 0
        self._stopping = self._closed = False
        self._listener: Listener | None = None
        self.uri = ""
        """Its address, once it was started."""
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Compiles the policy's programs, and then listens; OSError if the address is taken, or not this machine's."""
        seconds = await asyncio.to_thread(self.policy.warm_up)
        self._batcher.deadline = choose_deadline(self.settings.deadline, seconds)
        self._spawn(self._batcher.run())
        settings = self.settings
        self._listener = await serve(
            self._handle_connection,
            settings.host,
            settings.port,
            ssl=self._tls,
            process_request=self._handle_http,
            origins=[None],  # no page in a browser may talk to a robot's policy
            compression=None,
            max_size=settings.limits.frame_bytes,
            max_queue=2,
            server_header=None,
            logger=_QUIET,
        )
        host, port = next(iter(self._listener.sockets)).getsockname()[:2]
        self.uri = f"{'wss' if self._tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"
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
        """Accepts no more requests, answers those in progress (if `drain`), and closes. After this nothing is sent."""
        self._stopping = True
        if self._listener is None:
            return
        self._listener.close(close_connections=False)
        end = time.perf_counter() + self.settings.drain
        while drain and self._in_progress and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self._closed = True
        if self._in_progress:
            log.warning("%d requests are not answered", self._in_progress)
        for task in self._tasks:
            task.cancel()
        connections = list(self._listener.connections)
        await asyncio.gather(*(self._close(connection, GOING_AWAY, "the server stops") for connection in connections))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._listener.wait_closed(), 2.0)
        self._batcher.close()
        log.info("stopped")

    async def __aenter__(self) -> PolicyServer:
        await self.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()

    async def _handle_connection(self, connection: ServerConnection) -> None:
        """Serves one client for the lifetime of its connection."""
        session = Session(uuid.uuid4().hex[:12])
        self._clients += 1
        self.metrics.connected.inc()
        self.metrics.connections.set(self._clients)
        log.info("client connected", extra={"session": session.name, "peer": _peer(connection)})
        try:
            await self._send(connection, self._greeting)
            previous = None
            async for frame in connection:
                start = time.perf_counter()
                if not await self._handle_frame(connection, session, frame, start, previous):
                    break
                previous = time.perf_counter() - start
        except (ConnectionClosed, ConnectionAbortedError):
            pass
        finally:
            self._clients -= 1
            self.metrics.connections.set(self._clients)
            log.info("client left", extra={"session": session.name, "answered": session.answered})

    async def _handle_frame(
        self, connection: ServerConnection, session: Session, frame: str | bytes, start: float, previous: float | None
    ) -> bool:
        """Answers one frame; False if the connection is over. `previous` is the last request's time, seconds."""
        self._in_progress += 1
        answer = self._spawn(self._answer(frame, session, start, previous))
        gone = self._spawn(connection.wait_closed())
        outcome, seconds = "gone", None
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return False
            await self._send(connection, answer.result())
            outcome, seconds = "ok", time.perf_counter() - start
            return True
        except (ConnectionClosed, ConnectionAbortedError):
            return False
        except asyncio.CancelledError:
            outcome = "stopping"
            if not self._closed:
                raise
            return False
        except Exception as error:
            outcome = await self._fail(connection, session, error)
            return False
        finally:
            answer.cancel()
            gone.cancel()
            self._in_progress -= 1
            self.metrics.count_request(outcome, seconds)

    async def _answer(self, frame: str | bytes, session: Session, start: float, previous: float | None) -> str | bytes:
        """The frame to send in answer to `frame`."""
        if self._stopping:
            raise Refused("stopping", "the server is stopping.")
        if isinstance(frame, str):
            raise Refused("invalid", "a text frame came; requests are binary frames of msgpack.")
        observation = await asyncio.to_thread(self._validate, frame)
        if observation is _RESET:
            session.reset()
            return "reset successful"
        answer = await self._batcher.infer(observation, session, start)
        session.answered += 1
        self.metrics.last, self.metrics.subtask = (observation, answer["actions"]), answer.get("subtask")
        timing = answer["server_timing"] | ({} if previous is None else {"prev_total_ms": 1000 * previous})
        return pack(answer | {"server_timing": timing})

    def _validate(self, frame: bytes) -> Any:
        """The policy's validated request in a frame; `_RESET` for the endpoint `reset` of RoboArena's clients."""
        try:
            request = unpack(frame, self.settings.limits)
        except WireError as error:
            raise Refused("invalid", str(error)) from error
        endpoint = request.pop("endpoint", "infer") if isinstance(request, dict) else "infer"
        if isinstance(endpoint, str) and endpoint == "reset":
            return _RESET
        if not isinstance(endpoint, str) or endpoint != "infer":
            raise Refused("invalid", f"there is no endpoint {str(endpoint)[:40]!r}; there are infer and reset.")
        try:
            return self.policy.validate(request)
        except (ValueError, TypeError) as error:
            raise Refused("invalid", str(error)) from error

    async def _send(self, connection: ServerConnection, frame: str | bytes) -> None:
        """Sends a frame, unless the server is closed; cuts the connection of a client that does not read.

        Raises:
            ConnectionClosed: the client is gone.
            ConnectionAbortedError: it did not read, and its connection was cut.
        """
        if self._closed:
            raise asyncio.CancelledError
        try:
            async with asyncio.timeout(self.settings.send_timeout):
                await connection.send(frame)
        except TimeoutError:
            log.warning("a client does not read its answers", extra={"peer": _peer(connection)})
            connection.transport.abort()
            raise ConnectionAbortedError from None

    async def _fail(self, connection: ServerConnection, session: Session, error: Exception) -> str:
        """Sends the client what it may know of an error, and closes its connection; returns the outcome's name."""
        number = uuid.uuid4().hex[:12]
        outcome = error.outcome if isinstance(error, Refused) else "failed"
        fields = {"session": session.name, "peer": _peer(connection), "error": number, "outcome": outcome}
        if isinstance(error, Refused):
            message = str(error)[:MAX_MESSAGE]
            log.warning("request refused: %s", message, extra=fields)
        else:
            message = "internal error; the server's log has it under this number."
            log.error("request failed", exc_info=error, extra=fields)
        with contextlib.suppress(ConnectionClosed, ConnectionAbortedError, asyncio.CancelledError):
            await self._send(connection, f"{outcome}: {message} [{number}]")
            await self._close(connection, RETRY if outcome in ("busy", "late") else ERROR, "error in previous frame")
        return outcome

    async def _close(self, connection: ServerConnection, code: int, reason: str) -> None:
        """Closes a connection, by force if the client does not respond."""
        try:
            async with asyncio.timeout(2.0):
                await connection.close(code, reason)
        except TimeoutError:
            connection.transport.abort()

    async def _handle_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response to an HTTP request; None accepts a WebSocket connection."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/ready":
            ready = self.state == "ready"
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, f"{self.state}\n")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return self._refuse_connection(connection, request)
        if path not in ("/", "/metrics"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there are /, /metrics, /healthz and /ready.\n")
        if refusal := self._refuse_page(connection, request):
            return refusal
        if path == "/metrics":
            return _response(generate_latest(self.metrics.registry), {"Content-Type": CONTENT_TYPE_LATEST})
        numbers = (self.state, self.policy.metadata, self.metrics, self._clients, self._batcher.waiting)
        return _response((await asyncio.to_thread(status_page.render, *numbers)).encode(), status_page.HEADERS)

    def _refuse_connection(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response to a client that may not connect; None: it may."""
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

    def _refuse_page(self, connection: ServerConnection, request: Request) -> Response | None:
        """Pages show cameras. With a token they are for those who have it, without one for this machine alone."""
        if self._token is not None:
            if self._has_token(request):
                return None
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "log in with any name and the token.\n")
            response.headers["WWW-Authenticate"] = 'Basic realm="pi0", charset="UTF-8"'
            return response
        host = request.headers.get("Host", "").rpartition(":")[0] or request.headers.get("Host", "")
        peer = connection.remote_address
        # The name is checked too: the page of another site may have its name resolve to this machine.
        if peer and is_loopback(peer[0]) and is_loopback(host.strip("[]")):
            return None
        return connection.respond(http.HTTPStatus.FORBIDDEN, "only from this machine, as localhost; or set a token.\n")

    def _has_token(self, request: Request) -> bool:
        return self._token is None or is_authorized(request.headers.get("Authorization"), self._token)

    def _spawn(self, work) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


_QUIET = logging.getLogger(f"{__name__}.websockets")
_QUIET.setLevel(logging.CRITICAL)  # its messages repeat ours, or report noise of strangers


def _response(body: bytes, headers: Mapping[str, str]) -> Response:
    fields = {**headers, "Content-Length": str(len(body)), "Connection": "close"}
    return Response(http.HTTPStatus.OK, "OK", Headers(fields), body)


def _peer(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if address else "gone"
