"""Settings of the policy server; the flags of `pi0 serve` include them."""

from __future__ import annotations

import dataclasses

from pi0_client.msgpack_numpy import Limits


@dataclasses.dataclass(frozen=True)
class Settings:
    """Address, batching and limits of the server."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 means every address of this machine, and demands a token."""
    port: int = 8000
    """Port to listen at; 0 takes any free port and prints it."""
    insecure: bool = False
    """Serve a network without a token. Everybody in it can then drive the policy."""
    window_ms: float = 5.0
    """Milliseconds that a request may wait for those of other clients to join its batch; 0: batches form only while
    another is computed. A client without others never waits."""
    max_waiting: int = 256
    """Requests that may wait; more are refused, so that none gets old."""
    max_connections: int = 256
    """Clients connected at a time."""
    deadline: float = 10.0
    """Seconds from a request's arrival to its answer; it is refused if that is not possible."""
    send_timeout: float = 10.0
    """Seconds within which a client has to receive its answer; then its connection is cut."""
    drain: float = 10.0
    """Seconds to wait for requests in progress when the server stops."""
    max_frame_mb: float = 32.0
    """Size of a request, MiB; an array may have half of it."""

    @property
    def limits(self) -> Limits:
        """Limits of a request's frame."""
        size = int(self.max_frame_mb * 2**20)
        return Limits(frame_bytes=size, array_bytes=size // 2)
