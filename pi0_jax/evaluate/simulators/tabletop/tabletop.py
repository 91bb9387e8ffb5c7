"""The tabletop as a Gymnasium environment, `pi0_jax/Tabletop-v0`."""

# pyright: reportAttributeAccessIssue=false
# (the checker does not see MuJoCo's compiled functions)

from __future__ import annotations

import functools
from typing import Any

import mujoco
import numpy as np

from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.gantry import GantryEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import OBJECTS, TASKS, Snapshot, Task, find_task, is_done


@functools.cache
def load_model() -> mujoco.MjModel:
    """The compiled scene. One copy serves all environments of a process, since nothing changes it."""
    return mujoco.MjModel.from_xml_string(scene.build_xml())


class TabletopEnv(GantryEnv):
    """A ring that reaches for, or pushes, the object named in an English instruction.

    Observations, actions and arguments are those of `GantryEnv`. `info` holds `task` (a name), `success`, and
    `successes`: for every task's name whether it is done at this moment, so that one task can be scored while another
    is instructed.
    """

    def __init__(
        self,
        render_mode: str | None = None,
        image_size: int = 48,
        render_size: int = 256,
        lazy_images: bool = False,
    ):
        super().__init__(load_model(), render_mode, image_size, render_size, lazy_images)
        self._goal = self._model.body("goal").mocapid[0]
        self._bodies = [self._model.body(name).id for name in OBJECTS]
        self.task: Task = TASKS[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode; the layout depends on `seed` alone.

        See `tasks.episode_seed` for the seeds that demonstrations and evaluation use. `options` may hold `task`, a
        `Task` or a task's name (else it is drawn), and `prompt`, the sentence to instruct with (else one of the task's
        phrasings is drawn).

        Raises:
            UserError: for an unknown option or task, or a prompt that is no printable text of at most 256 characters.
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"task", "prompt"}:
            raise UserError(f'reset got the options {sorted(unknown)}; it knows "task" and "prompt".')
        rng = self.np_random
        positions = scene.sample_positions(rng, len(OBJECTS) + 1)
        yaws = rng.uniform(-np.pi, np.pi, len(OBJECTS))
        start = rng.uniform(scene.START_LOW, scene.START_HIGH)
        task = TASKS[rng.integers(len(TASKS))]
        phrasing = rng.random()

        task = options.get("task", task)
        self.task = find_task(task) if isinstance(task, str) else task
        prompts = self.task.prompts
        self._begin(start, options.get("prompt", prompts[int(phrasing * len(prompts))]))
        poses = self._data.qpos[3:].reshape(len(OBJECTS), 7)
        poses[:, :2] = positions[:-1]
        poses[:, 2] = [scene.REST_HEIGHT[name] for name in OBJECTS]
        poses[:, 3], poses[:, 6] = np.cos(yaws / 2), np.sin(yaws / 2)
        self._data.mocap_pos[self._goal] = [*positions[-1], 0]
        mujoco.mj_forward(self._model, self._data)
        return self._observation(), self._info()

    def snapshot(self) -> Snapshot:
        """The true state, for the scripted expert and for tests."""
        return Snapshot(
            tool=self._data.qpos[:3].copy(),
            command=self._data.ctrl.copy(),
            objects={name: self._data.xpos[body, :2].copy() for name, body in zip(OBJECTS, self._bodies, strict=True)},
            goal=self._data.mocap_pos[self._goal, :2].copy(),
        )

    def _info(self) -> dict[str, Any]:
        snapshot = self.snapshot()
        successes = {task.name: is_done(task, snapshot) for task in TASKS}
        return {"task": self.task.name, "success": is_done(self.task, snapshot), "successes": successes}
