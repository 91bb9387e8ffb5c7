"""Acts at a steady rate while the policy computes in the background.

    with Executor(infer, send, real_time(execute_steps=5), hold=policy.robot.still) as executor:
        executor.warm_up(observe())
        while not done:
            executor.step(observe())  # sends one action; never waits for the policy
            ...  # until the next control step

`infer` is anything that turns a raw observation into a chunk: a policy in this process or a client of a server. How
long it takes is measured, in control steps, and is what real-time chunking counts on.
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

from pi0_jax.inference.realtime.player import Delays, Played, Player, Strategy

_log = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """The executor was stopped, and sends no more actions."""


@dataclasses.dataclass
class Tally:
    """What happened so far."""

    steps: int = 0
    """Control steps."""
    held: int = 0
    """Of these, steps in which the robot held still for want of a chunk."""
    chunks: int = 0
    """Chunks that came in time to be executed, if only in part."""
    failures: int = 0
    """Questions that failed."""
    delays: collections.deque[int] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=1000))
    """Of the last chunks, control steps from question to answer."""
    seconds: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=1000))
    """Of the last chunks, from question to answer."""


class Executor:
    """Sends one action a control step, and asks the policy for chunks in a thread of its own.

    Observations go to `infer` with `previous` and `delay` in them where the strategy continues chunks; the answer is a
    chunk `[n, d]`, or a dict that holds it as `actions`.

    `step` belongs to one thread, the control loop's; `stop` may be called from any, signal handlers included.

    Args:
        infer: from a raw observation to a chunk of actions in the robot's units. If it raises, the question is lost.
        send: hands one action to the robot. It should return at once.
        strategy: of chunking.
        hold: from the last action to one that holds the robot still.
        delays: what is expected before any was measured, and how many measurements count.
        max_failures: lost questions in a row after which the executor stops.
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
        self.tally = Tally()

    def warm_up(self, observation: dict[str, Any]) -> None:
        """Asks once and forgets the answer, so that what is done at the first question only, compiling above all, is
        not measured as a delay. A strategy that continues chunks asks again, with what is left of the first."""
        chunk, _ = self._ask(observation)
        if self._player.strategy.continues:
            self._ask(observation | {"previous": chunk[self._player.strategy.execute_steps :], "delay": 0})

    def step(self, observation: dict[str, Any]) -> Played:
        """One control step: takes in an answer that has come, asks if it is time to, and sends the action that is due.

        It does not wait for the policy. Before the first chunk nothing is sent.

        Args:
            observation: the robot's newest raw observation; kept and read by another thread, so never changed again.

        Raises:
            Stopped: `stop` was called; or questions failed too often in a row, for the reason given as its cause.
        """
        if self._stopped:
            raise Stopped("the executor was stopped; make another one to go on.")
        self._take_in()
        ask = self._player.ask()
        if ask is not None:
            self._answer = self._pool.submit(self._ask, observation | ask.told())
        played = self._player.play()
        self.tally.steps += 1
        self.tally.held += played.chunk is None
        with self._gate:
            if self._stopped:
                raise Stopped("the executor was stopped; this step's action was not sent.")
            if played.action is not None:
                self._send(played.action)
        return played

    def stop(self) -> None:
        """Once this returns, no action is sent any more. It waits for a `send` in progress, and for nothing else."""
        with self._gate:
            self._stopped = True

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._pool.shutdown(wait=False)

    def _ask(self, observation: dict[str, Any]) -> tuple[np.ndarray, float]:
        """In the policy's thread: a checked chunk, and the seconds it took."""
        start = self._clock()
        answer = self._infer(observation)
        actions = np.asarray(answer["actions"] if isinstance(answer, Mapping) else answer)
        if actions.ndim != 2 or not len(actions) or self._dims not in (None, actions.shape[1]):
            raise ValueError(f"the policy's chunk has shape {actions.shape}; expected (steps, {self._dims or 'dims'}).")
        if not np.isfinite(actions).all():
            raise ValueError("the policy's chunk is NaN or infinite in places; none of it is executed.")
        self._dims = actions.shape[1]
        return actions, self._clock() - start

    def _take_in(self) -> None:
        """Receives the answer, if there is one."""
        if self._answer is None or not self._answer.done():
            return
        answer, self._answer = self._answer, None
        error = answer.exception()
        if error is None:
            actions, seconds = answer.result()
            self.tally.delays.append(self._player.receive(actions))
            self.tally.seconds.append(seconds)
            self.tally.chunks, self._failed = self.tally.chunks + 1, 0
            return
        self._player.lose()
        self.tally.failures, self._failed = self.tally.failures + 1, self._failed + 1
        _log.warning("question %d in a row failed: %s: %s", self._failed, type(error).__name__, error)
        if self._failed >= self._max_failures:
            self.stop()
            raise Stopped(f"{self._failed} questions in a row failed, the last with: {error}") from error
