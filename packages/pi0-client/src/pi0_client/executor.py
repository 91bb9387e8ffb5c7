"""Acts at a steady rate while the policy computes in the background.

    with Executor(infer, send, real_time(execute_steps=5), hold=policy.robot.still) as executor:
        executor.warm_up(observe())
        while not done:
            executor.step(observe())  # sends one action; never waits for the policy
            ...  # until the next control step

`infer` is any function from a raw observation to a chunk: a policy in this process or a client of a server. How long it
takes is measured in control steps, and real-time chunking counts on that.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pi0_client.player import Delays, Player, Step, Strategy

_log = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """The executor was stopped, and sends no more actions."""


@dataclasses.dataclass
class ExecutorStats:
    """Counts and times since the executor was made."""

    steps: int = 0
    """Control steps."""
    starved: int = 0
    """Steps in which the robot held still because no chunk was available."""
    chunks: int = 0
    """Chunks received."""
    failures: int = 0
    """Queries that raised, or whose answer was not a chunk of finite numbers."""
    delays: collections.deque[int] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=1000))
    """Delays of the last chunks, control steps."""
    seconds: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=1000))
    """Times of the last chunks from query to answer."""


class Executor:
    """Sends one action per control step, and queries the policy for chunks in a thread of its own.

    `step` belongs to one thread, the control loop's; `stop` may be called from any, signal handlers included.

    Args:
        infer: from a raw observation, with `previous` and `delay` added where the strategy continues chunks, to a chunk
            `[n, d]` in the robot's units, or a dict that has it as `actions`. If it raises, the query failed.
        send: hands one action to the robot. It should return at once.
        strategy: when to query, and what to execute meanwhile.
        hold: from the last action to one that holds the robot still.
        delays: what to expect before the first measurement, and how many measurements count.
        max_failures: consecutive failed queries after which the executor stops.
        clock: seconds, for the measured times.
        pool: where `infer` runs; None: a thread of its own.
    """

    def __init__(
        self,
        infer: Callable[[dict[str, Any]], Any],
        send: Callable[[np.ndarray], None],
        strategy: Strategy,
        *,
        hold: Callable[[np.ndarray], np.ndarray] = lambda last: last,
        delays: Delays | None = None,
        max_failures: int = 3,
        clock: Callable[[], float] = time.perf_counter,
        pool: concurrent.futures.Executor | None = None,
    ):
        self._infer, self._send, self._clock = infer, send, clock
        self._player = Player(strategy, hold, delays)
        self._pool = pool or concurrent.futures.ThreadPoolExecutor(1, "policy")
        self._answer: concurrent.futures.Future[tuple[np.ndarray, float]] | None = None
        self._max_failures, self._failed = max_failures, 0
        self._gate = threading.RLock()
        self._stopped = False
        self._dims: int | None = None
        self.stats = ExecutorStats()

    def warm_up(self, observation: dict[str, Any]) -> None:
        """Queries once and discards the answer, so that what happens at the first query only, compiling above all, is
        not measured as a delay. A strategy that continues chunks queries again, with the remaining actions."""
        chunk, _ = self._query(observation)
        if self._player.strategy.continues:
            self._query(observation | {"previous": chunk[self._player.strategy.execute_steps :], "delay": 0})

    def step(self, observation: dict[str, Any]) -> Step:
        """Runs one control step: accepts an answer that arrived, sends a query if one is due, and sends the action.

        It does not wait for the policy. Before the first chunk no action is sent. Another thread reads the observation,
        which is the robot's newest, so never change it afterwards.

        Raises:
            Stopped: `stop` was called; or queries failed too often in a row, for the reason in its cause.
        """
        if self._stopped:
            raise Stopped("the executor was stopped; make another one to go on.")
        self._collect()
        query = self._player.query()
        if query is not None:
            self._answer = self._pool.submit(self._query, observation | query.as_request())
        step = self._player.play()
        self.stats.steps += 1
        self.stats.starved += step.chunk is None
        with self._gate:
            if self._stopped:
                raise Stopped("the executor was stopped; this step's action was not sent.")
            if step.action is not None:
                self._send(step.action)
        return step

    def stop(self) -> None:
        """Once this returns, no action is sent any more. It waits for a `send` in progress, and for nothing else."""
        with self._gate:
            self._stopped = True

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._pool.shutdown(wait=False)

    def _query(self, observation: dict[str, Any]) -> tuple[np.ndarray, float]:
        """In the policy's thread: a validated chunk, and the seconds it took."""
        start = self._clock()
        answer = self._infer(observation)
        actions = np.asarray(answer["actions"] if isinstance(answer, Mapping) else answer)
        if actions.ndim != 2 or not len(actions) or self._dims not in (None, actions.shape[1]):
            raise ValueError(f"the policy's chunk has shape {actions.shape}; expected (steps, {self._dims or 'dims'}).")
        if not np.isfinite(actions).all():
            raise ValueError("the policy's chunk is NaN or infinite in places; none of it is executed.")
        self._dims = actions.shape[1]
        return actions, self._clock() - start

    def _collect(self) -> None:
        """Accepts the answer if it has arrived."""
        if self._answer is None or not self._answer.done():
            return
        answer, self._answer = self._answer, None
        error = answer.exception()
        if error is None:
            actions, seconds = answer.result()
            self.stats.delays.append(self._player.receive(actions))
            self.stats.seconds.append(seconds)
            self.stats.chunks, self._failed = self.stats.chunks + 1, 0
            return
        self._player.abandon()
        self.stats.failures, self._failed = self.stats.failures + 1, self._failed + 1
        _log.warning("%d consecutive queries failed; the last: %s: %s", self._failed, type(error).__name__, error)
        if self._failed >= self._max_failures:
            self.stop()
            raise Stopped(f"{self._failed} consecutive queries failed, the last with: {error}") from error
