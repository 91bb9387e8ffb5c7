"""Closed loop: a policy drives many episodes at once, one batch of observations per call."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int, Key
from tqdm import tqdm

from pi0_jax.config import PolicyConfig
from pi0_jax.data.robots import RawObservation, Robot, get_robot
from pi0_jax.errors import UserError
from pi0_jax.evaluate.demonstrate import frame, stack
from pi0_jax.evaluate.simulators.gym import Episodes, Running, Simulator


@runtime_checkable
class BatchPolicy(Protocol):
    """What the closed loop needs of `inference.policy.Policy`."""

    robot: Robot
    config: PolicyConfig

    def infer_batch(self, observations: Sequence[Any], keys: Any, num_steps: int | None = None, /) -> np.ndarray: ...


class Rate(NamedTuple):
    """A success rate with its 95 % Wilson interval, which does not degenerate at 0 or all successes."""

    successes: int
    episodes: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.successes:>4} of {self.episodes:<4} {self.rate:>6.1%}   [{self.low:.1%}, {self.high:.1%}]"


def success_rate(successes: int, episodes: int) -> Rate:
    """The rate of some successes."""
    from scipy.stats import binomtest  # takes half a second, which environments' processes need not wait

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return Rate(successes, episodes, successes / episodes, float(interval.low), float(interval.high))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of one episode."""

    index: int
    task: str
    seed: int
    """Seed of the layout."""
    prompt: str
    success: bool
    num_steps: int
    mode: str | None = None
    """Which of the simulator's `modes` it took; None: it came to none."""
    actions: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 0)), repr=False)
    """Executed actions, robot units `[num_steps, d]`; empty where the outcome was read from a file."""
    pictures: tuple[np.ndarray, ...] = dataclasses.field(default=(), repr=False)
    """One per step, for the episodes that were filmed."""
    frames: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    """What `roll_out` was told to record: observations and actions by feature name, `num_steps` rows each."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Outcomes of a run, in the order of episodes, and how long the policy took."""

    outcomes: tuple[Outcome, ...]
    batch_size: int
    seconds: tuple[float, ...]
    """Durations of the policy's calls, from observations to actions in host memory, without the one that compiles."""

    def rates(self) -> dict[str, Rate]:
        """Success rate of each task, and of `all`."""
        success: dict[str, list[bool]] = {}
        for outcome in self.outcomes:
            success.setdefault(outcome.task, []).append(outcome.success)
        success["all"] = [outcome.success for outcome in self.outcomes]
        return {task: success_rate(sum(values), len(values)) for task, values in success.items()}

    def table(self) -> str:
        """Success by task with confidence intervals, and the latency, as text for a terminal."""
        rates = self.rates()
        width = max(18, *map(len, rates))
        lines = [f"{task:<{width}} {rate}" for task, rate in rates.items()]
        if not self.seconds:
            return "\n".join(lines)
        p50, p95 = np.percentile(1000 * np.array(self.seconds), [50, 95])
        each = p50 / self.batch_size
        latency = f"p50 {p50:.1f} ms, p95 {p95:.1f} ms ({each:.2f} ms per chunk)"
        return "\n".join([*lines, f"latency of a call for {self.batch_size} chunks: {latency}"])


class Driver:
    """Executes the policy's chunks in one episode."""

    def __init__(self, index: int, episode: Running):
        self.index, self.episode = index, episode
        self.over = self.success = False
        self.actions: list[np.ndarray] = []
        """Executed so far."""

    def asks(self) -> bool:
        """Whether the policy has to answer now."""
        return True

    def observe(self) -> RawObservation:
        """What the policy is asked with."""
        return self.episode.observe()

    def receive(self, chunk: np.ndarray) -> None:
        """Takes the policy's answer."""
        raise NotImplementedError

    def advance(self) -> None:
        """Executes actions, at least one; runs in a thread of its own."""
        raise NotImplementedError

    def execute(self, action: np.ndarray) -> None:
        self.over, self.success = self.episode.step(action)
        self.actions.append(action)


D = TypeVar("D", bound=Driver)


def closed_loop(
    policy: BatchPolicy,
    simulator: Episodes,
    begin: Callable[[int], D],
    end: Callable[[D], None],
    indices: Iterable[int],
    seed: int,
    *,
    num_steps: int | None = None,
    batch_size: int,
    progress: str | None,
) -> list[float]:
    """Runs episodes to their ends, several side by side; as soon as one ends the next takes its place.

    Batches are filled up to `batch_size`, so that one program serves all. The noise of a chunk depends on the seed, the
    episode and its step. `begin` starts the episode of an index, in any thread; `end` is called, in this one, with the
    driver of an episode that is over. Other arguments and errors are those of `roll_out`.

    Returns:
        The seconds of each call of the policy but the first.
    """
    robot = get_robot(simulator.robot).name if simulator.robot.endswith(".py") else simulator.robot
    if policy.robot.name != robot:
        raise UserError(f"this policy is for the robot {policy.robot.name!r}; the environment has {robot!r}.")
    following, base, seconds = [*indices][::-1], jax.random.key(seed), []
    # Threads that wait for processes are as many as episodes; those that compute, as many as cores.
    count = os.cpu_count() if isinstance(simulator, Simulator) else batch_size
    bar = tqdm(total=len(following), desc=progress, unit="episode", disable=progress is None)
    with bar, concurrent.futures.ThreadPoolExecutor(count) as threads:
        running: list[D] = []
        while running or following:
            new = [following.pop() for _ in range(min(batch_size - len(running), len(following)))]
            running += threads.map(begin, new)
            asking = [driver for driver in running if driver.asks()]
            if asking:
                observations = list(threads.map(lambda driver: driver.observe(), asking))
                rows = [*range(len(asking))] + [0] * (batch_size - len(asking))
                numbers = np.array([(asking[i].index, len(asking[i].actions)) for i in rows])
                begun = time.perf_counter()
                chunks = policy.infer_batch([observations[i] for i in rows], noise_keys(base, *numbers.T), num_steps)
                seconds.append(time.perf_counter() - begun)
                for driver, chunk in zip(asking, chunks, strict=False):
                    driver.receive(chunk)
            list(threads.map(lambda driver: driver.advance(), running))
            for driver in [driver for driver in running if driver.over]:
                driver.episode.close()
                running.remove(driver)
                end(driver)
                bar.update()
    return seconds[1:] or seconds


def check_size(num_episodes: int, batch_size: int) -> int:
    """The number of episodes side by side; `UserError` where there is nothing to run."""
    if num_episodes < 1 or batch_size < 1:
        raise UserError(f"{num_episodes} episodes in batches of {batch_size}; both have to be at least 1.")
    return min(batch_size, num_episodes)


@jax.jit
def noise_keys(key: Key[jax.Array, ""], index: Int[jax.Array, "b"], step: Int[jax.Array, "b"]) -> Key[jax.Array, "b"]:
    """Keys of the chunks that episodes `index` ask for at `step`."""
    return jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(key, i), n))(index, step)


def roll_out(
    policy: BatchPolicy,
    simulator: Episodes,
    num_episodes: int,
    seed: int = 0,
    *,
    num_steps: int | None = None,
    batch_size: int = 64,
    film: Collection[int] = (),
    record: Mapping[str, str] = MappingProxyType({}),
    done: Mapping[int, Outcome] = MappingProxyType({}),
    keep: Callable[[Outcome], Outcome] = lambda outcome: outcome,
    progress: str | None = None,
) -> Rollout:
    """Runs episodes in closed loop; each chunk's first `execute_steps` actions are executed, then the policy is asked.

    Layouts and noise depend on the seed and the episode alone, whatever the batch size. Episode i is of task i modulo
    the number of tasks. `num_steps` are solver steps, None: the policy's; `batch_size` episodes run side by side; those
    of the indices `film` have pictures. `record` are cameras, by feature of a dataset, to record with states and
    actions in `Outcome.frames`; every step is drawn then. `done` are outcomes from before, by index, which are not run
    again. `keep` gets each outcome as its episode ends, and returns what is kept of it. `progress` is the title of a
    progress bar; None shows none.

    Raises:
        UserError: the simulator is another robot's, or there is nothing to run.
    """
    size, steps = check_size(num_episodes, batch_size), policy.config.execute_steps
    outcomes = {index: outcome for index, outcome in done.items() if index < num_episodes}

    def begin(index: int) -> _Slot:
        return _Slot(index, simulator.start(index, seed), steps, record, filmed=index in film)

    def end(slot: _Slot) -> None:
        outcomes[slot.index] = keep(slot.outcome())

    left = [index for index in range(num_episodes) if index not in outcomes]
    how = (policy, simulator, begin, end, left, seed)
    seconds = closed_loop(*how, num_steps=num_steps, batch_size=size, progress=progress)
    return Rollout(tuple(outcomes[i] for i in range(num_episodes)), size, tuple(seconds))


class _Slot(Driver):
    """Executes the beginning of each chunk while the simulator waits for the next."""

    def __init__(self, index: int, episode: Running, execute_steps: int, record: Mapping[str, str], *, filmed: bool):
        super().__init__(index, episode)
        self._execute_steps, self._record, self._prompt = execute_steps, record, ""
        self._rows: list[dict[str, np.ndarray]] = []
        self._pictures = [episode.picture()] if filmed else []

    def observe(self) -> RawObservation:
        self._raw = super().observe()
        self._prompt = self._prompt or self._raw["prompt"]
        return self._raw

    def receive(self, chunk: np.ndarray) -> None:
        self._chunk = chunk

    def advance(self) -> None:
        for i, action in enumerate(self._chunk[: self._execute_steps]):
            if self._record:
                self._rows.append(frame(self._raw if i == 0 else self.episode.observe(), action, self._record))
            self.execute(action)
            if self._pictures:
                self._pictures.append(self.episode.picture())
            if self.over:
                return

    def outcome(self) -> Outcome:
        actions, what = np.array(self.actions), (self.index, self.episode.task, self.episode.seed, self._prompt)
        frames = stack(self._rows) if self._rows else {}
        return Outcome(*what, self.success, len(actions), self.episode.mode, actions, tuple(self._pictures), frames)
