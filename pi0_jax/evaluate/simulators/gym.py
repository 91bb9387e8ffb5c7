"""Simulators are Gymnasium environments, and what the closed loop needs to know of them besides.

Simulator(
    make=lambda task: gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", render_mode="rgb_array"),
    robot="pusht",
    fps=10,
    tasks=("push_t",),
    observe=lambda env, seen: RawObservation(
        images={"top": seen["pixels"]}, state=seen["agent_pos"], prompt="push the T onto its outline"
    ),
    success=lambda info: info["is_success"],
)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pi0_jax.data.raw import RawObservation
from pi0_jax.errors import UserError
from pi0_jax.evaluate.gl import make_current

SPLITS = ("train", "validation", "evaluation")
MAX_IDLE = 4
"""Environments that wait for another episode; a heavy one takes hundreds of megabytes."""
Env = Any
"""A `gymnasium.Env`, with whatever attributes the simulator's functions use."""


class Start(NamedTuple):
    """How an episode begins: its task, and the arguments of `env.reset`."""

    task: str
    seed: int
    options: dict[str, Any] | None = None


@runtime_checkable
class Running(Protocol):
    """A running episode, here or in another process. `task` is the one that is scored, `seed` that of the layout,
    `mode` which of the simulator's `modes` it has taken by now."""

    task: str
    seed: int
    mode: str | None

    def observe(self) -> RawObservation: ...
    def step(self, action: np.ndarray) -> tuple[bool, bool]: ...
    def picture(self) -> np.ndarray: ...
    def close(self) -> None: ...


@runtime_checkable
class Episodes(Protocol):
    """What the closed loop needs of a simulator, here or in other processes; the fields are those of `Simulator`."""

    @property
    def name(self) -> str: ...
    @property
    def robot(self) -> str: ...
    @property
    def fps(self) -> int: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def per_task(self) -> int: ...
    @property
    def modes(self) -> tuple[str, ...]: ...
    def start(self, index: int, seed: int, split: str = "evaluation", attempt: int = 0) -> Running: ...


@dataclasses.dataclass(frozen=True)
class Simulator:
    """An environment with its tasks."""

    make: Callable[[str], Env]
    """An environment for the task of that name. It is used for one episode after another."""
    robot: str
    """Name of the robot in `pi0_jax.data.robots`."""
    fps: int
    """Actions per second."""
    tasks: tuple[str, ...]
    """Names of the tasks, in the order of reports; episode i is of task i modulo their number."""
    observe: Callable[[Env, Any], RawObservation]
    """From the environment and the observation that it returned last to the policy's. Called only when the policy is
    asked, so that rendering costs little."""
    action: Callable[[np.ndarray], Any] = lambda action: action
    """From the robot's action to the environment's."""
    success: Callable[[dict[str, Any]], bool] = lambda info: info["success"]
    """Whether the episode succeeded, from a step's `info`."""
    layout: Callable[[int, int, str, int], Start] | None = None
    """How `start(index, seed, split, attempt)` begins; None: the tasks in turn, and a seed drawn from all four."""
    picture: Callable[[Env], Any] = lambda env: env.render()
    """A picture for people, uint8 `[h, w, 3]`; by default the environment's, with `render_mode="rgb_array"`."""
    expert: Callable[[Env, Any], np.ndarray] | None = None
    """A scripted expert's action of the robot, from what `observe` gets, for recording; None: there is no expert."""
    random_action: Callable[[np.random.Generator], np.ndarray] | None = None
    """A random action of the robot, for noise while recording; None: uniform over the (bounded) action space."""
    subtask: Callable[[Env], str] | None = None
    """The scripted expert's subtask at this moment, for recording; None: there are none."""
    questions: Callable[[Env], tuple[str, dict[str, str]]] | None = None
    """A camera, and questions about its picture at this moment with their answers; None: there are none."""
    per_task: int = 10
    """Episodes of each task in an evaluation, by the benchmark's protocol."""
    modes: tuple[str, ...] = ()
    """Names of equally right ways to succeed, among which demonstrations choose at random: the `mode` of a step's
    `info`, once the episode has taken one."""
    threads: bool = False
    """Whether environments are light and any thread may use them: they draw without GL, whose contexts belong to the
    thread that made them. Others live in processes, few of which keep environments that are not in use."""
    name: str = ""
    """Name for messages; `get_simulator` sets it."""
    _idle: dict[str, list[Env]] = dataclasses.field(default_factory=dict, repr=False)

    def start(self, index: int, seed: int, split: str = "evaluation", attempt: int = 0) -> Episode:
        """Begins an episode with a layout of its own.

        Episode i is of task i modulo their number. Another `seed` gives other layouts, another `attempt` another one
        for the same task. `split` is "train", "validation" or "evaluation", which share no layout.
        """
        start = (self.layout or self._layout)(index, seed, split, attempt)
        try:
            env = self._idle.setdefault(start.task, []).pop()
        except IndexError:
            env = self.make(start.task)
        return Episode(self, env, start)

    def _layout(self, index: int, seed: int, split: str, attempt: int) -> Start:
        words = np.random.SeedSequence([SPLITS.index(split), seed, index, attempt]).generate_state(1)
        return Start(self.tasks[index % len(self.tasks)], int(words[0]))


class Episode:
    """One running episode (`Running`)."""

    def __init__(self, simulator: Simulator, env: Env, start: Start):
        self._simulator, self._env = simulator, env
        self.task, self.seed = start.task, start.seed
        self.mode: str | None = None
        self._seen = False
        self._observation, _ = env.reset(seed=start.seed, options=start.options)

    def observe(self) -> RawObservation:
        """What the policy sees now.

        Raises:
            UserError: a camera's first picture is of one colour, which is how drawing fails that fails silently.
        """
        make_current(self._env)
        raw = self._simulator.observe(self._env, self._observation)
        for camera, image in {} if self._seen else raw.get("images", {}).items():
            if np.ptp(image) == 0:
                raise UserError(
                    f"the camera {camera!r} of the simulator {self._simulator.name} draws nothing: each pixel is "
                    f"{image.flat[0]} at the beginning of an episode of {self.task!r}. Does drawing work here? "
                    "MUJOCO_GL=egl or osmesa chooses another way."
                )
        self._seen = True
        return raw

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        """Executes one action; returns whether the episode is over, which it is with success, and whether it
        succeeded."""
        self._observation, _, terminated, truncated, info = self._env.step(self._simulator.action(action))
        success = bool(self._simulator.success(info))
        self.mode = info.get("mode")
        return bool(terminated or truncated or success), success

    def picture(self) -> np.ndarray:
        make_current(self._env)
        return np.asarray(self._simulator.picture(self._env))

    def expert(self) -> np.ndarray:
        if self._simulator.expert is None:
            raise UserError("this simulator has no scripted expert, so nothing can be recorded in it.")
        return self._simulator.expert(self._env, self._observation)

    def subtask(self) -> str | None:
        """What the expert is doing now; None where the simulator has no subtasks."""
        return None if self._simulator.subtask is None else self._simulator.subtask(self._env)

    def questions(self) -> tuple[str, dict[str, str]]:
        """A camera, and questions about its picture with their answers; of a simulator that asks some."""
        assert self._simulator.questions is not None
        return self._simulator.questions(self._env)

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        if self._simulator.random_action is not None:
            return self._simulator.random_action(rng)
        return rng.uniform(self._env.action_space.low, self._env.action_space.high).astype(np.float32)

    def close(self) -> None:
        """Gives the environment back, for another episode."""
        idle = self._simulator._idle
        if not self._simulator.threads and sum(map(len, idle.values())) >= MAX_IDLE:
            with contextlib.suppress(Exception):
                next(envs for envs in idle.values() if envs).pop(0).close()
        idle[self.task].append(self._env)
