"""How chunks of actions become one action per control step.

Bookkeeping alone: no clock, no thread, no policy. Control steps are counted 0, 1, 2, …; the policy is queried at the
beginning of a step, with that step's observation, and its first action is meant for that step. When the answer
arrives, the robot has moved on, and the actions for the steps in between are too late.

`executor` plays chunks on a robot, `pi0_jax.evaluate.latency` in simulated time; both follow a `Player`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
    """Actions for successive control steps, in the robot's units."""

    start: int
    """Control step of the first action."""
    actions: np.ndarray
    """`[n, d]`"""

    def remaining(self, step: int) -> np.ndarray:
        """The actions `[m, d]` for `step` and later."""
        return self.actions[max(step - self.start, 0) :]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """When the policy is queried, and what is executed meanwhile. The functions below make the usual ones.

    Fewer than one step, or a negative decay, is a ValueError.
    """

    execute_steps: int
    """Steps of a chunk after which the policy is queried for the next."""
    waits: bool = False
    """The robot holds still while the policy computes, and the next chunk is executed from its first action."""
    decay: float | None = None
    """Decay of temporal ensembling, the average of all chunks that cover a step. None: the newest chunk counts."""
    continues: bool = False
    """A query includes what remains of the chunk in execution, and how much of it will be executed meanwhile."""

    def __post_init__(self):
        if self.execute_steps < 1 or (self.decay is not None and self.decay < 0):
            raise ValueError(
                f"execute_steps is {self.execute_steps} and decay {self.decay}; expected at least 1 and at least 0."
            )


def open_loop(horizon: int) -> Strategy:
    """Every chunk to its end, then the next; the robot waits for it."""
    return Strategy(horizon, waits=True)


def receding_horizon(execute_steps: int, *, waits: bool = True) -> Strategy:
    """The first actions of every chunk. With `waits` the robot holds still while the next one is computed; without, it
    continues, and switches to the new chunk at whatever step that is due: naive asynchronous execution."""
    return Strategy(execute_steps, waits=waits)


def temporal_ensemble(decay: float = 0.01, execute_steps: int = 1) -> Strategy:
    """ACT's averages over the chunks of the last steps (arXiv 2304.13705); the policy computes all the time."""
    return Strategy(execute_steps, decay=decay)


def real_time(execute_steps: int) -> Strategy:
    """Real-time chunking (arXiv 2506.07339): asynchronous receding horizon whose new chunk continues the old one, of
    which the query includes the remaining actions. `execute_steps` is the paper's s_min."""
    return Strategy(execute_steps, continues=True)


def ensemble(chunks: Sequence[Chunk], step: int, decay: float) -> np.ndarray:
    """The average action `[d]` for a step of the chunks that cover it: chunk i of them, in the order in which they were
    queried, has weight exp(-decay · i)."""
    covering = (chunk.remaining(step) for chunk in chunks if chunk.start <= step)
    actions = np.stack([remaining[0] for remaining in covering if len(remaining)])
    weights = np.exp(-decay * np.arange(len(actions)))
    return (weights[:, None] * actions).sum(0) / weights.sum()


class Delays:
    """Measured delays, and the one to expect.

    Of the last `memory` measurements a quantile is expected (1: the longest, as in the paper); before any, `initial`.
    """

    def __init__(self, memory: int = 10, quantile: float = 1.0, initial: int = 0):
        self._measured: collections.deque[int] = collections.deque(maxlen=memory)
        self._quantile, self._initial = quantile, initial

    def add(self, steps: int) -> None:
        """Records a measured delay, control steps."""
        self._measured.append(steps)

    def expected(self) -> int:
        """The delay to count on, control steps."""
        if not self._measured:
            return self._initial
        return math.ceil(np.quantile(self._measured, self._quantile) - 1e-9)


class Query(NamedTuple):
    """A query for a chunk."""

    step: int
    """Control step of its observation."""
    previous: np.ndarray | None
    """Remaining actions `[m, d]` of the chunk in execution, robot units, the first one for `step`; None where there are
    none, or the strategy does not continue chunks."""
    delay: int
    """How many of these are expected to be executed before the answer."""

    def as_request(self) -> dict:
        """The entries to add to the raw observation: `previous` and `delay`, or none."""
        return {} if self.previous is None else {"previous": self.previous, "delay": self.delay}


class Step(NamedTuple):
    """What is executed at one control step."""

    action: np.ndarray | None
    """Action `[d]`, robot units; None before the first chunk."""
    chunk: int | None
    """Number of the newest chunk that it comes from; None where the robot holds still because no chunk is available."""


class Player:
    """Plays chunks step by step: first `query`, then `receive` if an answer arrived, then `play`, which ends the step.

    Remaining actions are in the robot's units. That makes them valid for the next query: the policy converts them to
    its own units with the new observation, so actions relative to the state become relative to the new state.

    Args:
        strategy: when to query and what to execute.
        hold: from the last action to one that holds the robot still, for steps without a chunk; by default the last
            action again, which is right for positions (`Robot.still` of `pi0_jax` knows better).
        delays: measured delays; may be shared between players.
    """

    def __init__(
        self,
        strategy: Strategy,
        hold: Callable[[np.ndarray], np.ndarray] = lambda last: last,
        delays: Delays | None = None,
    ):
        self.strategy, self._hold, self.delays = strategy, hold, delays or Delays()
        self.step = 0
        self.num_chunks = 0
        self._chunks: list[Chunk] = []
        self._pending: Query | None = None
        self._executed = 0  # steps since the pending query in which a chunk was executed
        self._last: np.ndarray | None = None

    def query(self) -> Query | None:
        """The query to send at the beginning of this step; None while one is pending, or if none is due."""
        newest = self._chunks[-1] if self._chunks else None
        if self._pending is not None or (newest and self.step < newest.start + self.strategy.execute_steps):
            return None
        remaining = newest.remaining(self.step) if newest and self.strategy.continues else ()
        previous = np.asarray(remaining) if len(remaining) else None
        delay = 0 if previous is None else min(self.delays.expected(), len(previous))
        self._pending, self._executed = Query(self.step, previous, delay), 0
        return self._pending

    def receive(self, actions: np.ndarray) -> int:
        """Accepts the answer `[n, d]` to the pending query; returns the measured delay, control steps.

        It is played from this step on. Steps in which the robot held still consume no action of it.
        """
        assert self._pending is not None
        delay = self.step - self._pending.step
        self.delays.add(delay)
        self._pending = None
        self._chunks.append(Chunk(self.step - self._executed, np.asarray(actions)))
        self.num_chunks += 1
        return delay

    def abandon(self) -> None:
        """Gives up the pending query, so that another can be sent."""
        self._pending = None

    def due(self) -> np.ndarray | None:
        """The action `[d]` that the chunks have for this step; None where they have ended."""
        if self.strategy.decay is not None and any(len(chunk.remaining(self.step)) for chunk in self._chunks):
            return ensemble(self._chunks, self.step, self.strategy.decay)
        remaining = self._chunks[-1].remaining(self.step) if self._chunks else np.empty(0)
        return remaining[0] if len(remaining) else None

    def play(self) -> Step:
        """Returns the action of this step and moves on to the next."""
        action = None if self.strategy.waits and self._pending is not None else self.due()
        chunk = None if action is None else self.num_chunks - 1
        if action is not None:
            self._executed += 1
        elif self._last is not None:
            action = self._hold(self._last)
        self._last = action
        self.step += 1
        older = self._chunks[:-1] if self.strategy.decay is not None else []
        self._chunks = [each for each in older if len(each.remaining(self.step))] + self._chunks[-1:]
        return Step(action, chunk)
