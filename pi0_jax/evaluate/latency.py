"""Closed loop in simulated time: answers of the policy are late, unsteady or lost, as they are on a robot.

Time is the simulator's, counted in control steps; how long this machine computes does not matter, and every run of a
seed is the same. Chunks are played by the `Player` that plays them on a robot.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from pi0_client.player import Player, Strategy, real_time, receding_horizon, temporal_ensemble
from pi0_jax.config import RealTimeConfig
from pi0_jax.evaluate.rollout import check_run, wilson
from pi0_jax.evaluate.simulators.suites import Episode, Suite
from pi0_jax.inference.policy import Policy

STRATEGIES: dict[str, tuple[Callable[[int], Strategy], RealTimeConfig | None]] = {
    "synchronous": (receding_horizon, None),
    "asynchronous": (lambda steps: receding_horizon(steps, waits=False), None),
    "ensemble": (lambda steps: temporal_ensemble(), None),
    "guidance": (real_time, RealTimeConfig()),
    "identity": (real_time, RealTimeConfig("identity", "linear", 10.0)),
    "trained": (real_time, RealTimeConfig("trained")),
}
"""Ways to act by name: the strategy for a number of executed steps, and how the policy continues chunks (LeRobot's
settings for its own variant)."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long answers take, milliseconds from observation to chunk.

    Raises:
        ValueError: a negative time, or a share of losses that is none.
    """

    typical: float = 0.0
    jitter: float = 0.0
    """Answers take a time between `typical` - jitter and `typical` + jitter, all equally likely."""
    drop: float = 0.0
    """Share of questions that are never answered."""
    timeout: float = 1000.0
    """When such a question is given up."""

    def __post_init__(self):
        if not (0 <= self.jitter <= self.typical and 0 <= self.drop <= 1 and self.timeout > 0):
            raise ValueError(
                f"a latency of {self.typical} ± {self.jitter} ms with a share of {self.drop} lost, given up after "
                f"{self.timeout} ms; times have to be positive after jitter, and a share is between 0 and 1."
            )

    def draw(self, rng: np.random.Generator) -> tuple[float, bool]:
        """Milliseconds until a question is over, and whether it is answered then."""
        time, lost = self.typical + self.jitter * rng.uniform(-1, 1), rng.random() < self.drop
        return (self.timeout if lost else time), not lost


@dataclasses.dataclass(frozen=True)
class Trace:
    """What happened in one episode."""

    task: str
    success: bool
    actions: np.ndarray = dataclasses.field(repr=False)
    """As executed, robot units `[num_steps, d]`; zeros before the first chunk."""
    chunks: np.ndarray = dataclasses.field(repr=False)
    """Number of the newest chunk that each action comes from; -1 where the robot held still."""
    delays: tuple[int, ...]
    """Of the chunks, control steps."""
    breaks: tuple[float, ...]
    """For each chunk that came while another was executed: the distance between what the two say for that step."""

    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Norms of the changes from one action to the next: at seams, and inside chunks. A seam is where a new chunk
        begins, and where the robot stops or goes on for want of one; its first start is none."""
        first = int(np.argmax(self.chunks >= 0))
        size = np.linalg.norm(np.diff(self.actions[first:], axis=0), axis=1)
        seam = np.diff(self.chunks[first:]) != 0
        return size[seam], size[~seam]


def simulate(
    policy: Policy,
    suite: Suite,
    strategy: Strategy,
    latency: Latency,
    num_episodes: int,
    seed: int = 0,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[Trace]:
    """Runs episodes in simulated time. Layouts, noise and latencies depend on the seed and the episode alone.

    Args:
        policy: whose robot is the suite's; its `real_time` is what continues chunks.
        suite: the simulator.
        strategy: of chunking.
        latency: of the policy's answers.
        num_episodes: episode i is of task i modulo the number of tasks.
        seed: other seeds give other layouts, noise and latencies.
        batch_size: episodes that run side by side.
        progress: title of a progress bar; None shows none.

    Raises:
        ValueError: the suite is another robot's, or there is nothing to run.
    """
    check_run(policy, suite, num_episodes, batch_size)
    batch_size = min(batch_size, num_episodes)
    base = jax.random.key(seed)

    def begin(index: int) -> _Run:
        player = Player(strategy, policy.robot.still)
        rng = np.random.default_rng([seed, index])
        rest = np.zeros(len(policy.robot.actions), np.float32)
        return _Run(index, suite.start(index, seed, distract=False), player, latency, 1000 / suite.fps, rest, rng)

    following, traces = iter(range(batch_size, num_episodes)), {}
    runs = [begin(i) for i in range(batch_size)]
    bar = tqdm(total=num_episodes, desc=progress, unit="episode", disable=progress is None)
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        while runs:
            asking = [run for run in runs if run.begin_step()]
            if asking:
                observations = list(threads.map(_Run.observe, asking))
                rows = [*range(len(asking))] + [0] * (batch_size - len(asking))  # one size, one program
                keys = jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(base, i), n))(
                    np.array([asking[i].index for i in rows]), np.array([asking[i].player.step for i in rows])
                )
                for run, chunk in zip(asking, policy.infer_batch([observations[i] for i in rows], keys), strict=False):
                    run.answer_later(chunk)
            list(threads.map(_Run.end_step, runs))
            for run in [run for run in runs if run.over]:
                traces[run.index] = run.trace()
                bar.update()
                runs.remove(run)
                runs += [begin(index) for index in itertools.islice(following, 1)]
    return [traces[i] for i in range(num_episodes)]


class _Run:
    """One episode, its player, and the answer that is on its way."""

    def __init__(
        self, index: int, episode: Episode, player: Player, latency: Latency, period: float, rest: np.ndarray,
        rng: np.random.Generator,
    ):  # fmt: skip
        self.index, self.player, self._rest = index, player, rest
        self._episode, self._latency, self._period, self._rng = episode, latency, period, rng
        self._ask = self._chunk = None
        self._due = 0.0
        self.over = self._success = False
        self._actions: list[np.ndarray] = []
        self._chunks: list[int] = []
        self._delays: list[int] = []
        self._breaks: list[float] = []

    def begin_step(self) -> bool:
        """Takes in what has come by now; returns whether the policy is to be asked."""
        self._take_in()
        if self._ask is None:
            self._ask = self.player.query()
            return self._ask is not None
        return False

    def observe(self) -> dict:
        assert self._ask is not None
        return self._episode.observe() | self._ask.as_request()

    def answer_later(self, chunk: np.ndarray) -> None:
        milliseconds, answered = self._latency.draw(self._rng)
        self._due = self.player.step * self._period + milliseconds
        self._chunk = chunk if answered else None
        self._take_in()

    def end_step(self) -> None:
        """Executes the action of this step."""
        played = self.player.play()
        action = self._rest if played.action is None else played.action
        self._actions.append(action)
        self._chunks.append(-1 if played.chunk is None else played.chunk)
        self.over, self._success = self._episode.step(action)

    def trace(self) -> Trace:
        return Trace(
            self._episode.task, self._success, np.array(self._actions), np.array(self._chunks),
            tuple(self._delays), tuple(self._breaks),
        )  # fmt: skip

    def _take_in(self) -> None:
        if self._ask is None or self.player.step * self._period < self._due - 1e-6:
            return
        if self._chunk is None:
            self.player.abandon()
        else:
            before = self.player.due()
            self._delays.append(self.player.receive(self._chunk))
            after = self.player.due()
            if before is not None and after is not None:
                self._breaks.append(float(np.linalg.norm(after - before)))
        self._ask = self._chunk = None


def summary(traces: list[Trace], fps: float) -> dict[str, float]:
    """The figures of a run: `success` with its interval (`low`, `high`), mean `seconds` of successful episodes, mean
    `held` steps an episode, mean `delay` in steps, and in the units of the actions the mean and 95th percentile of the
    changes at seams (`seam`, `seam_p95`), the mean change inside chunks (`inside`) and the mean `break`."""
    won = [trace for trace in traces if trace.success]
    low, high = wilson(len(won), len(traces))
    seams, insides = (np.concatenate(sizes) for sizes in zip(*(trace.changes() for trace in traces), strict=True))
    breaks = [size for trace in traces for size in trace.breaks]
    delays = [delay for trace in traces for delay in trace.delays]
    return {
        "episodes": len(traces),
        "success": len(won) / len(traces),
        "low": low,
        "high": high,
        "seconds": _mean([len(trace.actions) / fps for trace in won]),
        "held": _mean([int((trace.chunks < 0).sum()) for trace in traces]),
        "delay": _mean(delays),
        "seam": _mean(seams),
        "seam_p95": float(np.percentile(seams, 95)) if len(seams) else float("nan"),
        "inside": _mean(insides),
        "break": _mean(breaks),
    }


def describe(strategy: str, latency: Latency, figures: dict[str, float]) -> str:
    """A run's figures as text for a terminal."""
    steady = f"{latency.typical:g}" + (f" ± {latency.jitter:g}" if latency.jitter else "")
    lost = f", {latency.drop:.0%} lost" if latency.drop else ""
    won, total = round(figures["success"] * figures["episodes"]), figures["episodes"]
    return (
        f"{strategy}, {steady} ms{lost}: {won} of {total} {won / total:.1%} "
        f"[{figures['low']:.1%}, {figures['high']:.1%}]\n"
        f"{figures['seconds']:.2f} s to success, {figures['held']:.1f} steps held, delay {figures['delay']:.1f} steps\n"
        f"change from one action to the next: {figures['seam']:.4g} at seams, {figures['inside']:.4g} inside chunks; "
        f"a new chunk departs from the old by {figures['break']:.4g}"
    )


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
