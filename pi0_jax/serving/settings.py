"""Settings of the policy server; the flags of `pi0 serve` include them."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping

from pi0_client.msgpack_numpy import Limits

log = logging.getLogger(__name__)

DEADLINE = 10.0
"""Default of `Settings.deadline` for policies that are quick enough."""


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
    deadline: float | None = None
    """Seconds from a request's arrival to its answer; it is refused if that is not possible. None: 10, or more where
    the policy takes longer, as measured at the start."""
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


def choose_deadline(deadline: float | None, seconds: Mapping[int, float]) -> float:
    """The deadline of requests, seconds; logs what batches take, and warns where a given deadline is too short.

    A request may arrive when the slowest batch has just begun, and then be computed in another one, so two of these
    have to fit; a default has half as much again to spare.

    Args:
        deadline: `Settings.deadline`.
        seconds: of a batch, by batch size.
    """
    slowest, fewest = max(seconds.values()), min(seconds)
    times = ", ".join(f"{size}: {value:.3g} s" for size, value in sorted(seconds.items()))
    log.info("time of a batch by its size: %s", times)
    if deadline is None:
        chosen = max(DEADLINE, float(math.ceil(3 * slowest)))
        if chosen > DEADLINE:
            message = "the policy is slow here (time of a batch by its size: %s): requests are refused after %g s, and "
            message += "not after %g (--deadline). Clients have to wait as long: Client(..., timeout=%g) of pi0_client"
            log.warning(message, times, chosen, DEADLINE, chosen)
        return chosen
    if deadline < 2 * slowest:
        refused = "every request" if deadline < seconds[fewest] else "requests that wait for others"
        message = "--deadline %g is too short for this policy (time of a batch by its size: %s): %s will be refused. "
        message += "Leave it out, give at least %g, or compile small batches alone: --batch-sizes %d"
        log.warning(message, deadline, times, refused, math.ceil(2 * slowest), fewest)
    return deadline
