"""What the server counts: Prometheus metrics of its own registry, and the last requests for the status page."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
OUTCOMES = ("ok", "invalid", "busy", "late", "stopping", "not_finite", "failed", "gone")
"""What becomes of a request. invalid: the client's fault; failed: the policy's or the server's; gone: it left."""


class Metrics:
    """Counters, and the last latencies."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("pi0_requests", "Requests by what became of them.", ["outcome"], registry=registry)
        self.latency = Histogram(
            "pi0_request_seconds", "From a request's arrival to its answer sent.", buckets=SECONDS, registry=registry
        )
        self.inference = Histogram(
            "pi0_inference_seconds", "One call of the policy for a batch.", buckets=SECONDS, registry=registry
        )
        self.wait = Histogram(
            "pi0_wait_seconds", "From a request's arrival to the start of its batch.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "pi0_batch_size", "Requests computed together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.waiting = Gauge("pi0_waiting", "Requests that wait to be computed.", registry=registry)
        self.connections = Gauge("pi0_connections", "Clients connected.", registry=registry)
        self.connected = Counter("pi0_connections_opened", "Clients that ever connected.", registry=registry)
        self.refused = Counter(
            "pi0_handshakes_refused", "Clients turned away before they connected, by reason.", ["reason"],
            registry=registry,
        )  # fmt: skip
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.batch_sizes: collections.Counter[int] = collections.Counter()
        self.recent: collections.deque[float] = collections.deque(maxlen=2000)
        """Milliseconds from arrival to sent, of the last answers."""
        self.last: tuple[Any, Any] | None = None
        """The observation and the actions of the last answer."""

    def saw_batch(self, size: int, seconds: float, waits: Sequence[float]) -> None:
        """Counts a computed batch; `waits` are the seconds that its requests waited for it."""
        self.batch.observe(size)
        self.batch_sizes[size] += 1
        self.inference.observe(seconds)
        for wait in waits:
            self.wait.observe(wait)

    def saw_request(self, outcome: str, seconds: float | None = None) -> None:
        """Counts a request that is done with, and how long it took if it was answered."""
        self.requests.labels(outcome).inc()
        self.outcomes[outcome] += 1
        if seconds is not None:
            self.latency.observe(seconds)
            self.recent.append(1000 * seconds)
