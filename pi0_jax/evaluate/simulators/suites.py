"""Simulators to evaluate in: what the closed loop needs to know of each. They are imported when asked for."""

from __future__ import annotations

import difflib
from typing import Any, Protocol

import numpy as np


class Episode(Protocol):
    """One running episode. `observe` is called only when the policy is asked, so that drawing costs little."""

    task: str
    """Name of what is scored."""
    prompt: str
    """What the policy is told."""

    def observe(self) -> dict[str, Any]:
        """The policy's raw observation."""
        ...

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        """Executes one action; returns whether the episode is over, and whether it succeeded."""
        ...

    def picture(self) -> np.ndarray:
        """A picture for people, uint8 `[h, w, 3]`."""
        ...


class Suite(Protocol):
    """A simulator with its tasks."""

    robot: str
    """Name of the robot in `pi0_jax.data.robots`."""
    fps: int
    tasks: tuple[str, ...]
    """Names of the tasks, in the order of reports; episode i is of task i modulo their number."""

    def start(self, index: int, seed: int, *, distract: bool) -> Episode:
        """Begins episode `index` of a seed, fresh: no demonstration starts like it.

        With `distract`, the instruction names another object than the one that is scored.
        """
        ...


def get_suite(name: str) -> Suite:
    """The simulator of that name.

    Raises:
        ValueError: there is none.
        ImportError: its packages are not installed; the message says which extra brings them.
    """
    from pi0_jax.evaluate.simulators.tabletop.tasks import SUITES

    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no environment {name!r}; there are {', '.join(SUITES)}.{hint}")
    return Tabletop(name)


class Tabletop:
    """The embedded tabletop, `pi0_jax.evaluate.simulators.tabletop`, with one of its sets of tasks."""

    robot = "tabletop"

    def __init__(self, name: str = "tabletop"):
        from pi0_jax.evaluate.simulators.tabletop import scene, tabletop, tasks

        self.fps = scene.CONTROL_HZ
        self._env, self._seed, self._tasks = tabletop.TabletopEnv, tasks.episode_seed, tasks.SUITES[name]
        self.tasks = tuple(task.name for task in self._tasks)

    def start(self, index: int, seed: int, *, distract: bool) -> Episode:
        layout = self._seed("evaluation", index, seed)
        task = self._tasks[index % len(self.tasks)]
        options: dict[str, Any] = {"task": task}
        if distract:
            rng = np.random.default_rng(layout)
            others = [t for t in self._tasks if t.kind == task.kind and t.object != task.object]
            options["prompt"] = str(rng.choice(others[rng.integers(len(others))].prompts))
        env = self._env(lazy_images=True)
        env.reset(seed=layout, options=options)
        return _TabletopEpisode(env)


class _TabletopEpisode:
    def __init__(self, env):
        self._env = env
        self.task, self.prompt = env.task.name, env.prompt

    def observe(self) -> dict[str, Any]:
        return self._env.observe()

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        _, _, terminated, truncated, info = self._env.step(action)
        return terminated or truncated, info["success"]

    def picture(self) -> np.ndarray:
        return self._env.draw_view("view", 160)
