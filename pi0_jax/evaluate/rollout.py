"""Closed loop: a policy drives many episodes at once, one batch of observations a call."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Sequence

import jax
import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

from pi0_jax.evaluate.simulators.suites import Episode, Suite
from pi0_jax.inference.policy import Policy


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one episode."""

    index: int
    task: str
    prompt: str
    success: bool
    num_steps: int
    actions: np.ndarray = dataclasses.field(repr=False)
    """Those that were executed, robot units `[num_steps, d]`."""
    pictures: tuple[np.ndarray, ...] = dataclasses.field(default=(), repr=False)
    """One a step, for the episodes that were filmed."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Outcomes of a run, in the order of episodes, and how long the policy took."""

    outcomes: tuple[Outcome, ...]
    batch_size: int
    seconds: tuple[float, ...]
    """Of each call of the policy, from observations to actions in host memory."""

    def rates(self) -> dict[str, tuple[int, int]]:
        """Successes and episodes of each task, and of `all`."""
        counts: dict[str, tuple[int, int]] = {}
        for outcome in self.outcomes:
            for name in (outcome.task, "all"):
                won, total = counts.get(name, (0, 0))
                counts[name] = won + outcome.success, total + 1
        return {name: counts[name] for name in [*(n for n in counts if n != "all"), "all"] if name in counts}


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson 1927); does not degenerate at 0 or all successes."""
    interval = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def roll_out(
    policy: Policy,
    suite: Suite,
    num_episodes: int,
    seed: int = 0,
    *,
    num_steps: int | None = None,
    batch_size: int = 64,
    distract: bool = False,
    film: Sequence[int] = (),
    progress: str | None = None,
) -> Rollout:
    """Runs episodes in closed loop; each chunk's first `execute_steps` actions are executed, then the policy is asked.

    As soon as an episode ends the next takes its place, so the batch stays full and one program serves all. Layouts
    and noise depend on the seed and the episode alone, whatever the batch size.

    Args:
        policy: whose robot is the suite's.
        suite: the simulator.
        num_episodes: number of episodes; episode i is of task i modulo the number of tasks.
        seed: other seeds give other layouts and other noise.
        num_steps: solver steps; None: the policy's.
        batch_size: episodes that run side by side.
        distract: the instruction names another object than the one that is scored.
        film: indices of episodes to keep pictures of.
        progress: title of a progress bar; None shows none.

    Raises:
        ValueError: the suite is another robot's, or there is nothing to run.
    """
    check_run(policy, suite, num_episodes, batch_size)
    batch_size = min(batch_size, num_episodes)
    base = jax.random.key(seed)
    outcomes: dict[int, Outcome] = {}
    seconds = []
    slots = [_Slot(i, suite.start(i, seed, distract=distract), i in film) for i in range(batch_size)]
    # The first call compiles; it is not part of the latency.
    policy.infer_batch([slot.episode.observe() for slot in slots], jax.random.split(base, batch_size), num_steps)
    bar = tqdm(total=num_episodes, desc=progress, unit="episode", disable=progress is None)
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:

        def advance(slot: _Slot, actions: np.ndarray) -> None:
            for action in actions[: policy.config.execute_steps]:
                if not slot.over:
                    slot.step(action)

        while len(outcomes) < num_episodes:
            observations = list(threads.map(lambda slot: slot.episode.observe(), slots))
            keys = jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(base, i), n))(
                np.array([slot.index for slot in slots]), np.array([slot.num_steps for slot in slots])
            )
            start = time.perf_counter()
            chunks = policy.infer_batch(observations, keys, num_steps)
            seconds.append(time.perf_counter() - start)
            list(threads.map(advance, slots, chunks))
            for place, slot in enumerate(slots):
                if slot.over and slot.index not in outcomes:
                    outcomes[slot.index] = slot.outcome()
                    bar.update()
                    following = max(s.index for s in slots) + 1
                    if following < num_episodes:
                        episode = suite.start(following, seed, distract=distract)
                        slots[place] = _Slot(following, episode, following in film)
    return Rollout(tuple(outcomes[i] for i in range(num_episodes)), batch_size, tuple(seconds))


def check_run(policy: Policy, suite: Suite, num_episodes: int, batch_size: int) -> None:
    """Raises ValueError where the suite is another robot's, or there is nothing to run."""
    if policy.robot.name != suite.robot:
        raise ValueError(f"this policy is for the robot {policy.robot.name!r}; the environment has {suite.robot!r}.")
    if num_episodes < 1 or batch_size < 1:
        raise ValueError(f"{num_episodes} episodes in batches of {batch_size}; both have to be at least 1.")


class _Slot:
    """A place in the batch, and the episode that has it."""

    def __init__(self, index: int, episode: Episode, filmed: bool):
        self.index, self.episode, self.filmed = index, episode, filmed
        self.over = self.success = False
        self.num_steps = 0
        self.actions: list[np.ndarray] = []
        self.pictures = [episode.picture()] if filmed else []

    def step(self, action: np.ndarray) -> None:
        self.over, self.success = self.episode.step(action)
        self.actions.append(action)
        self.num_steps += 1
        if self.filmed:
            self.pictures.append(self.episode.picture())

    def outcome(self) -> Outcome:
        task, prompt = self.episode.task, self.episode.prompt
        actions = np.array(self.actions)
        return Outcome(self.index, task, prompt, self.success, self.num_steps, actions, tuple(self.pictures))


def table(rollout: Rollout) -> str:
    """Success by task with confidence intervals, and the latency, as text for a terminal."""
    lines = []
    for name, (won, total) in rollout.rates().items():
        low, high = wilson(won, total)
        lines.append(f"{name:<18} {won:>4} of {total:<4} {won / total:>6.1%}   [{low:.1%}, {high:.1%}]")
    p50, p95 = np.percentile(1000 * np.array(rollout.seconds), [50, 95])
    lines.append(
        f"latency of a call for {rollout.batch_size} chunks: p50 {p50:.1f} ms, p95 {p95:.1f} ms "
        f"({p50 / rollout.batch_size:.2f} ms a chunk)"
    )
    return "\n".join(lines)
