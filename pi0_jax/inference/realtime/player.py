"""How chunks of actions become one action at each control step.

Bookkeeping alone: no clock, no thread, no policy. Control steps are counted 0, 1, 2, …; the policy is asked at the
beginning of a step, with what was observed then, and its first action is meant for that very step. By the time the
answer is there, the robot has gone on: the actions for the steps in between are too late.

`inference.executor` plays chunks on a robot, `evaluate.latency` in simulated time; both follow a `Player`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Chunk(NamedTuple):
    """Actions for successive control steps, in the robot's units."""

    start: int
    """Control step of the first one."""
    actions: Float[np.ndarray, "n d"]

    def rest(self, step: int) -> Float[np.ndarray, "m d"]:
        """The actions for `step` and later."""
        return self.actions[max(step - self.start, 0) :]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """When the policy is asked, and what is executed meanwhile. The functions below make the usual ones.

    Raises:
        ValueError: fewer than one step, or a decay that is negative.
    """

    execute_steps: int
    """Steps of a chunk after which the policy is asked for the next."""
    waits: bool = False
    """The robot holds still while the policy computes, and the next chunk is executed from its first action."""
    decay: float | None = None
    """Of temporal ensembling: all chunks that have an action for a step are averaged. None: the newest one counts."""
    continues: bool = False
    """The policy is told what is left of the chunk in execution, and how much of that will be executed meanwhile."""

    def __post_init__(self):
        if self.execute_steps < 1 or (self.decay is not None and self.decay < 0):
            raise ValueError(
                f"execute_steps is {self.execute_steps} and decay {self.decay}; expected at least 1 and at least 0."
            )


def open_loop(horizon: int) -> Strategy:
    """Every chunk to its end, then the next; the robot waits for it."""
    return Strategy(horizon, waits=True)


def receding_horizon(execute_steps: int, *, waits: bool = True) -> Strategy:
    """The first actions of every chunk. With `waits` the robot stands still while the next one is computed; without,
    it goes on, and changes over to the new chunk wherever that happens to be: naive asynchronous execution."""
    return Strategy(execute_steps, waits=waits)


def temporal_ensemble(decay: float = 0.01, execute_steps: int = 1) -> Strategy:
    """ACT's averages over the chunks of the last steps (arXiv 2304.13705), while the policy computes all the time."""
    return Strategy(execute_steps, decay=decay)


def real_time(execute_steps: int) -> Strategy:
    """Real-time chunking (arXiv 2506.07339): as asynchronous receding horizon, but the new chunk goes on from the old
    one, for which the policy is told what is left of that. `execute_steps` is the paper's s_min."""
    return Strategy(execute_steps, continues=True)


def ensemble(chunks: Sequence[Chunk], step: int, decay: float) -> Float[np.ndarray, "d"]:
    """The average action for a step of those chunks that have one: number i of them weighs exp(-decay · i), and they
    come in the order in which they were asked for."""
    actions = np.stack([rest[0] for chunk in chunks if chunk.start <= step and len(rest := chunk.rest(step))])
    weights = np.exp(-decay * np.arange(len(actions)))
    return (weights[:, None] * actions).sum(0) / weights.sum()


class Delays:
    """What is known about delays, from those that were measured.

    Args:
        memory: how many of the last ones count.
        quantile: which of them is expected; 1 is the longest, as in the paper.
        initial: expected before the first was measured.
    """

    def __init__(self, memory: int = 10, quantile: float = 1.0, initial: int = 0):
        self._measured: collections.deque[int] = collections.deque(maxlen=memory)
        self._quantile, self._initial = quantile, initial

    def add(self, steps: int) -> None:
        """Remembers a measured delay, control steps."""
        self._measured.append(steps)

    def expected(self) -> int:
        """The delay to count on, control steps."""
        if not self._measured:
            return self._initial
        return math.ceil(np.quantile(self._measured, self._quantile) - 1e-9)


class Ask(NamedTuple):
    """What the policy is to be asked."""

    step: int
    """When: the observation is that of this control step."""
    previous: Float[np.ndarray, "m d"] | None
    """What is left of the chunk in execution, robot units, the first one for `step`; None where there is nothing, or
    the strategy does not tell."""
    delay: int
    """How many of these are expected to be executed before the answer."""

    def told(self) -> dict:
        """What joins the raw observation; see `data.transform.check_observation`."""
        return {} if self.previous is None else {"previous": self.previous, "delay": self.delay}


class Played(NamedTuple):
    """What is executed at one control step."""

    action: Float[np.ndarray, "d"] | None
    """Robot units; None before the first chunk, when there is nothing to hold."""
    chunk: int | None
    """Number of the newest chunk that it comes from; None where the robot holds still for want of a chunk."""


class Player:
    """Plays chunks step by step: first `ask`, then `receive` for whatever came, then `play`, which ends the step.

    Left-overs are in the robot's units. That is what makes them valid for the next question: the policy brings them
    into its own units with the new observation, so actions relative to the state are relative to the new state.

    Args:
        strategy: when to ask and what to execute.
        hold: from the last action to the one that holds the robot still, for steps without a chunk; by default the last
            action again, which is right for positions (`Robot.still` knows better).
        delays: measured delays; shared or not.
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
        self._pending: Ask | None = None
        self._moved = 0  # steps since the pending question in which a chunk was executed
        self._last: np.ndarray | None = None

    def ask(self) -> Ask | None:
        """What to ask the policy at the beginning of this step, if anything; one question at a time."""
        newest = self._chunks[-1] if self._chunks else None
        if self._pending is not None or (newest and self.step < newest.start + self.strategy.execute_steps):
            return None
        rest = newest.rest(self.step) if newest and self.strategy.continues else ()
        previous = np.asarray(rest) if len(rest) else None
        delay = 0 if previous is None else min(self.delays.expected(), len(previous))
        self._pending, self._moved = Ask(self.step, previous, delay), 0
        return self._pending

    def receive(self, actions: Float[np.ndarray, "n d"]) -> int:
        """Takes the answer to the pending question, for this step on.

        Steps in which the robot stood still took nothing from the chunk.

        Returns:
            The measured delay, control steps.
        """
        assert self._pending is not None
        delay = self.step - self._pending.step
        self.delays.add(delay)
        self._pending = None
        self._chunks.append(Chunk(self.step - self._moved, np.asarray(actions)))
        self.num_chunks += 1
        return delay

    def lose(self) -> None:
        """Gives up the pending question, so that another can be asked."""
        self._pending = None

    def due(self) -> Float[np.ndarray, "d"] | None:
        """What the chunks at hand say for this step; None where they have ended."""
        if self.strategy.decay is not None and any(len(chunk.rest(self.step)) for chunk in self._chunks):
            return ensemble(self._chunks, self.step, self.strategy.decay)
        rest = self._chunks[-1].rest(self.step) if self._chunks else np.empty((0, 0))
        return rest[0] if len(rest) else None

    def play(self) -> Played:
        """The action of this step; the next step begins."""
        waiting = self.strategy.waits and self._pending is not None
        action = None if waiting else self.due()
        chunk = None if action is None else self.num_chunks - 1
        if action is not None:
            self._moved += 1
        elif self._last is not None:
            action = self._hold(self._last)
        self._last = action
        self.step += 1
        kept = [chunk for chunk in self._chunks[:-1] if len(chunk.rest(self.step))]
        self._chunks = (kept if self.strategy.decay is not None else []) + self._chunks[-1:]
        return Played(action, chunk)
