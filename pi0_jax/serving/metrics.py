"""Metrics of the server: for Prometheus in a registry of their own, and of the last requests for the status page."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
OUTCOMES = ("ok", "invalid", "busy", "late", "stopping", "not_finite", "failed", "gone")
"""Outcomes of a request. invalid: the client's fault; failed: the policy's or the server's; gone: the client left."""


class Metrics:
    """Counters, histograms and the last latencies."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        histogram = functools.partial(Histogram, buckets=SECONDS, registry=registry)
        self.requests = Counter("pi0_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self.latency = histogram("pi0_request_seconds", "From a request's arrival to its answer sent.")
        self.inference = histogram("pi0_inference_seconds", "One call of the policy for a batch.")
        self.wait = histogram("pi0_wait_seconds", "From a request's arrival to its batch's start.")
        self.batch = histogram("pi0_batch_size", "Requests computed together.", buckets=(1, 2, 4, 8, 16, 32, 64))
        self.waiting = Gauge("pi0_waiting", "Requests waiting to be computed.", registry=registry)
        self.connections = Gauge("pi0_connections", "Clients connected.", registry=registry)
        self.connected = Counter("pi0_connections_opened", "Connections since the start.", registry=registry)
        self.refused = Counter("pi0_handshakes_refused", "Refused connections.", ["reason"], registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.batch_sizes: collections.Counter[int] = collections.Counter()
        self.recent: collections.deque[float] = collections.deque(maxlen=2000)
        """Latencies of the last answers, milliseconds from arrival to sent."""
        self.last: tuple[Any, Any] | None = None
        """The observation and the actions of the last answer."""
        self.subtask: str | None = None
        """Its subtask, if it has one."""

    def count_batch(self, size: int, seconds: float, waits: Sequence[float]) -> None:
        """Counts a computed batch; `waits` are the seconds that its requests waited."""
        self.batch.observe(size)
        self.batch_sizes[size] += 1
        self.inference.observe(seconds)
        for wait in waits:
            self.wait.observe(wait)

    def count_request(self, outcome: str, seconds: float | None = None) -> None:
        """Counts a finished request, and its seconds if it was answered."""
        self.requests.labels(outcome).inc()
        self.outcomes[outcome] += 1
        if seconds is not None:
            self.latency.observe(seconds)
            self.recent.append(1000 * seconds)
