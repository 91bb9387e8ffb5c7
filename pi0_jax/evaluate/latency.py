"""Closed loop in simulated time: answers of the policy are late, unsteady or lost, as they are on a robot.

Time is the simulator's, counted in control steps; how long this machine computes does not matter, and every run of a
seed is the same. Chunks are played by the `Player` that plays them on a robot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np

from pi0_client.player import Player, Query, Strategy, real_time, receding_horizon, temporal_ensemble
from pi0_jax.config import RealTimeConfig
from pi0_jax.data.robots import RawObservation, Robot
from pi0_jax.errors import UserError
from pi0_jax.evaluate.rollout import BatchPolicy, Driver, check_size, closed_loop, success_rate
from pi0_jax.evaluate.simulators.gym import Episodes

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
        UserError: a negative time, or an invalid probability.
    """

    typical: float | int = 0.0
    jitter: float | int = 0.0
    """Answers take a time between `typical` - jitter and `typical` + jitter, all equally likely."""
    drop: float | int = 0.0
    """Probability that a request is never answered."""
    timeout: float | int = 1000.0
    """When such a request is given up."""

    def __post_init__(self):
        if not (0 <= self.jitter <= self.typical and 0 <= self.drop <= 1 and self.timeout > 0):
            raise UserError(
                f"a latency of {self.typical} ± {self.jitter} ms, lost with probability {self.drop} and given up after "
                f"{self.timeout} ms; times have to be positive after jitter, and a probability is between 0 and 1."
            )

    def draw(self, rng: np.random.Generator) -> tuple[float | int, bool]:
        """Milliseconds until a request is over, and whether it is answered then."""
        time, lost = self.typical + self.jitter * rng.uniform(-1, 1), rng.random() < self.drop
        return (self.timeout if lost else time), not lost


@dataclasses.dataclass(frozen=True)
class Trace:
    """Record of one episode."""

    task: str
    success: bool
    actions: np.ndarray = dataclasses.field(repr=False)
    """Executed actions, robot units `[num_steps, d]`; zeros before the first chunk."""
    chunks: np.ndarray = dataclasses.field(repr=False)
    """Number of the newest chunk that each action comes from; -1 where the robot held still."""
    delays: tuple[int, ...]
    """Delays of the chunks, control steps."""
    breaks: tuple[float, ...]
    """For each chunk that came while another was executed: the distance between their actions for that step."""

    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Norms of the changes from one action to the next: at seams, and inside chunks. A seam is where a new chunk
        begins, and where the robot stops or starts because no chunk was available; its first start is none."""
        first = int(np.argmax(self.chunks >= 0))
        size = np.linalg.norm(np.diff(self.actions[first:], axis=0), axis=1)
        seam = np.diff(self.chunks[first:]) != 0
        return size[seam], size[~seam]


def simulate(
    policy: BatchPolicy,
    simulator: Episodes,
    strategy: Strategy,
    latency: Latency,
    num_episodes: int,
    seed: int = 0,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[Trace]:
    """Runs episodes in simulated time. Layouts, noise and latencies depend on the seed and the episode alone.

    The policy's `real_time` is how chunks are continued; other arguments and errors are those of `roll_out`.
    """

    traces: dict[int, Trace] = {}

    def begin(index: int) -> _Run:
        return _Run(index, seed, policy.robot, simulator, strategy, latency)

    def end(run: _Run) -> None:
        traces[run.index] = run.trace()

    size, indices = check_size(num_episodes, batch_size), range(num_episodes)
    closed_loop(policy, simulator, begin, end, indices, seed, batch_size=size, progress=progress)
    return [traces[index] for index in indices]


class _Run(Driver):
    """One episode, its player, and the answer that is on its way."""

    def __init__(self, index: int, seed: int, robot: Robot, simulator: Episodes, strategy: Strategy, latency: Latency):
        super().__init__(index, simulator.start(index, seed))
        self._player, self._latency = Player(strategy, robot.still), latency
        self._rng = np.random.default_rng([seed, index])
        self._period = 1000 / simulator.fps  # milliseconds between actions
        self._still = np.zeros(len(robot.actions), np.float32)
        self._query: Query | None = None
        self._chunk: np.ndarray | None = None
        self._due = 0.0
        self._chunks: list[int] = []
        self._delays: list[int] = []
        self._breaks: list[float] = []

    def asks(self) -> bool:
        """Takes in what has come by now; returns whether the policy is to be asked."""
        self._take_in()
        if self._query is None:
            self._query = self._player.query()
            return self._query is not None
        return False

    def observe(self) -> RawObservation:
        assert self._query is not None
        return cast(RawObservation, super().observe() | self._query.as_request())

    def receive(self, chunk: np.ndarray) -> None:
        """Lets an answer begin its way."""
        milliseconds, answered = self._latency.draw(self._rng)
        self._due = self._player.step * self._period + milliseconds
        self._chunk = chunk if answered else None
        self._take_in()

    def advance(self) -> None:
        """Executes the action of this step."""
        played = self._player.play()
        self.execute(self._still if played.action is None else played.action)
        self._chunks.append(-1 if played.chunk is None else played.chunk)

    def trace(self) -> Trace:
        actions, chunks = np.array(self.actions), np.array(self._chunks)
        return Trace(self.episode.task, self.success, actions, chunks, tuple(self._delays), tuple(self._breaks))

    def _take_in(self) -> None:
        if self._query is None or self._player.step * self._period < self._due - 1e-6:
            return
        if self._chunk is None:
            self._player.abandon()
        else:
            before = self._player.due()
            self._delays.append(self._player.receive(self._chunk))
            after = self._player.due()
            if before is not None and after is not None:
                self._breaks.append(float(np.linalg.norm(after - before)))
        self._query = self._chunk = None


def summary(traces: list[Trace], fps: int) -> dict[str, float | int]:
    """The figures of a run: those of its success `Rate`, mean `seconds` of successful episodes, mean
    `held` steps per episode, mean `delay` in steps, and in the units of the actions the mean and 95th percentile of the
    changes at seams (`seam`, `seam_p95`), the mean change inside chunks (`inside`) and the mean `break`."""
    won = [trace for trace in traces if trace.success]
    seams, insides = (np.concatenate(sizes) for sizes in zip(*(trace.changes() for trace in traces), strict=True))
    breaks = [size for trace in traces for size in trace.breaks]
    delays = [delay for trace in traces for delay in trace.delays]
    return {
        **success_rate(len(won), len(traces))._asdict(),
        "seconds": _mean([len(trace.actions) / fps for trace in won]),
        "held": _mean([int((trace.chunks < 0).sum()) for trace in traces]),
        "delay": _mean(delays),
        "seam": _mean(seams),
        "seam_p95": float(np.percentile(seams, 95)) if len(seams) else float("nan"),
        "inside": _mean(insides),
        "break": _mean(breaks),
    }


def describe(strategy: str, latency: Latency, figures: dict[str, float | int]) -> str:
    """A run's figures as text for a terminal."""
    steady = f"{latency.typical:g}" + (f" ± {latency.jitter:g}" if latency.jitter else "")
    lost = f", {latency.drop:.0%} lost" if latency.drop else ""
    rate = success_rate(int(figures["successes"]), int(figures["episodes"]))
    return (
        f"{strategy}, {steady} ms{lost}: {rate}\n"
        f"{figures['seconds']:.2f} s to success, {figures['held']:.1f} steps held, delay {figures['delay']:.1f} steps\n"
        f"change from one action to the next: {figures['seam']:.4g} at seams, {figures['inside']:.4g} inside chunks; "
        f"a new chunk departs from the old by {figures['break']:.4g}"
    )


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
