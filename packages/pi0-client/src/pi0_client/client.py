"""A client of the policy server.

    with Client("ws://localhost:8000") as client:
        chunk = client.infer({"images": {...}, "state": ..., "prompt": "..."})["actions"]

openpi's client works as well; this one adds a timeout, errors with their reason, and a seed for the noise.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Sequence
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from pi0_client.msgpack_numpy import pack, unpack


class ServerError(RuntimeError):
    """The server refused a request or could not answer it; its message says why.

    `retry`: it was only too busy, so that a request may work a moment later.
    """

    def __init__(self, message: str, retry: bool = False):
        super().__init__(message)
        self.retry = retry


class Client:
    """A connection to a policy server, which keeps a session for it: the policy's memory of one robot.

    After an error the server closes the connection; the next call opens another one, with a fresh session. One thread
    at a time may use a client.

    Args:
        uri: `ws://host:port`, or `wss://` for TLS.
        token: the server's token, if it demands one.
        timeout: seconds to wait for a connection or a response.
        tls: context for `wss`; None: the system's certificates.

    Raises:
        OSError: there is no server, or it ended the connection.
        ServerError: the server turned the connection down.
    """

    def __init__(
        self,
        uri: str = "ws://localhost:8000",
        token: str | None = None,
        *,
        timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ):
        self._uri, self._token, self._timeout, self._tls = uri, token, timeout, tls
        self._connection: ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self.metadata: dict[str, Any] = {}
        self._connect()

    def infer(
        self, observation: dict[str, Any], seed: int | Sequence[int] | np.ndarray | None = None
    ) -> dict[str, Any]:
        """Requests a chunk of actions.

        Args:
            observation: `images` by camera, `state` and `prompt`; `metadata` names the robot's cameras and states.
            seed: seed of the noise that becomes the actions, or the two words of a JAX key's data. None: the server
                chooses, with other noise for each request of the session.

        Returns:
            `actions` `[ah, d]` in the robot's units, `policy_timing` and `server_timing` in milliseconds.

        Raises:
            ServerError: the server refused; the message says why.
            TimeoutError: no response in time.
            OSError: the connection was lost.
        """
        if seed is not None:
            observation = observation | {"seed": seed if isinstance(seed, int) else [int(n) for n in seed]}
        return unpack(self._request(pack(observation)))

    def reset(self) -> None:
        """Makes the server forget this session, as before a new episode; raises as `infer` does."""
        self._request(pack({"endpoint": "reset"}), "reset successful")

    def close(self) -> None:
        """Ends the session."""
        self._connection = None
        self._open.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _connect(self) -> ClientConnection:
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        try:
            opening = connect(
                self._uri,
                compression=None,
                max_size=None,
                open_timeout=self._timeout,
                additional_headers=headers,
                ssl=self._tls,
            )
            connection = self._open.enter_context(opening)
            self.metadata = unpack(_bytes(connection.recv(self._timeout)))
        except InvalidStatus as error:
            body = error.response.body.decode("utf-8", "replace") if error.response.body else ""
            retry = error.response.status_code == 503
            raise ServerError(f"{self._uri} answers {error.response.status_code}: {body.strip()}", retry) from None
        except InvalidURI:
            raise ValueError(
                f"{self._uri!r} is not a server's address; expected ws://localhost:8000 or wss://..."
            ) from None
        except (ConnectionClosed, InvalidMessage) as error:
            raise ConnectionError(f"{self._uri} closed the connection at once: {error}") from error
        except ConnectionRefusedError as error:
            raise ConnectionRefusedError(f"nobody listens at {self._uri}. Start one with: pi0 serve RUN") from error
        self._connection = connection
        return connection

    def _request(self, frame: bytes, expected: str | None = None) -> bytes:
        connection = self._connection or self._connect()
        try:
            connection.send(frame)
            answer = connection.recv(self._timeout)
            if isinstance(answer, bytes) or answer == expected:
                return _bytes(answer)
            with contextlib.suppress(ConnectionClosed):
                connection.recv(self._timeout)
            retry = connection.protocol.close_code == 1013
        except ConnectionClosed as error:
            self.close()
            raise ConnectionError(f"{self._uri} closed the connection: {error}") from error
        except TimeoutError:
            self.close()  # a late response must not be taken for that to the next request
            raise TimeoutError(f"{self._uri} gave no answer within {self._timeout:g} s.") from None
        self.close()
        raise ServerError(answer, retry)


def _bytes(answer: bytes | str) -> bytes:
    return answer.encode() if isinstance(answer, str) else answer
