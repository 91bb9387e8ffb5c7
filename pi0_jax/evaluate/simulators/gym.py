"""Any Gymnasium environment as a simulator.

GymSimulator(
    make=lambda task: gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos"),
    robot="pusht",
    fps=10,
    tasks=("push_t",),
    observe=lambda env, seen: {
        "images": {"top": seen["pixels"]}, "state": seen["agent_pos"], "prompt": "push the T onto its outline"
    },
    success=lambda info: info["is_success"],
)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import gymnasium
import numpy as np

from pi0_jax.data.robots import RawObservation
from pi0_jax.errors import UserError

E = TypeVar("E", bound=gymnasium.Env)
SPLITS = ("train", "validation", "evaluation")


class Start(NamedTuple):
    """How an episode begins."""

    task: str
    seed: int
    """`env.reset(seed=...)`."""
    options: dict[str, Any] | None = None
    """`env.reset(options=...)`."""


@dataclasses.dataclass(frozen=True)
class GymSimulator(Generic[E]):
    """A `Simulator` made of functions on a Gymnasium environment."""

    make: Callable[[str], E]
    """An environment for the task of that name. It is used for one episode after another."""
    robot: str
    fps: int
    tasks: tuple[str, ...]
    observe: Callable[[E, Any], RawObservation]
    """From the environment and what it returned last to the raw observation"""
    action: Callable[[np.ndarray], Any] = lambda action: action
    """From the robot's action to the environment's."""
    success: Callable[[dict[str, Any]], bool] = lambda info: info["success"]
    """Whether the episode succeeded, from a step's `info`."""
    layout: Callable[[int, int, str, int], Start] | None = None
    """How `start(index, seed, split, attempt)` begins; None: the tasks in turn, and a seed drawn from all four."""
    picture: Callable[[E], Any] = lambda env: env.render()
    """A picture for people; by default the environment's, which needs `render_mode="rgb_array"`."""
    expert: Callable[[E, Any], np.ndarray] | None = None
    """The robot's action by a scripted expert, from what `observe` gets."""
    random_action: Callable[[np.random.Generator], np.ndarray] | None = None
    """A random action of the robot's, for noise while recording; None: uniform over the (bounded) action space."""
    _idle: dict[str, list[E]] = dataclasses.field(default_factory=dict, repr=False)

    def start(self, index: int, seed: int, split: str = "evaluation", attempt: int = 0) -> GymEpisode[E]:
        start = (self.layout or self._layout)(index, seed, split, attempt)
        idle = self._idle.setdefault(start.task, [])
        return GymEpisode(self, idle.pop() if idle else self.make(start.task), start)

    def _layout(self, index: int, seed: int, split: str, attempt: int) -> Start:
        words = np.random.SeedSequence([SPLITS.index(split), seed, index, attempt]).generate_state(1)
        return Start(self.tasks[index % len(self.tasks)], int(words[0]))


class GymEpisode(Generic[E]):
    """One episode in an environment."""

    def __init__(self, simulator: GymSimulator[E], env: E, start: Start):
        self._simulator, self._env = simulator, env
        self.task, self.seed = start.task, start.seed
        self._observation, _ = env.reset(seed=start.seed, options=start.options)

    def observe(self) -> RawObservation:
        return self._simulator.observe(self._env, self._observation)

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        self._observation, _, terminated, truncated, info = self._env.step(self._simulator.action(action))
        return bool(terminated or truncated), bool(self._simulator.success(info))

    def picture(self) -> np.ndarray:
        return np.asarray(self._simulator.picture(self._env))

    def expert(self) -> np.ndarray:
        if self._simulator.expert is None:
            raise UserError("this simulator has no scripted expert, so nothing can be recorded in it.")
        return self._simulator.expert(self._env, self._observation)

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        if self._simulator.random_action is not None:
            return self._simulator.random_action(rng)
        space = self._env.action_space
        assert isinstance(space, gymnasium.spaces.Box), "random_action is needed where actions are no box"
        return rng.uniform(space.low, space.high).astype(np.float32)

    def close(self) -> None:
        self._simulator._idle[self.task].append(self._env)
