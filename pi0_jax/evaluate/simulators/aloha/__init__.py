"""ALOHA in simulation (Zhao et al. 2023, arXiv 2304.13705; gym-aloha): two arms transfer a cube, or insert a peg.

As openpi's `pi0_aloha_sim` meets it: camera `top` of 480 × 640 pixels, joint positions, at most 300 steps (LeRobot
gives 400) at 50 per second; success is the reward 4. Its packages: pi0 env install aloha.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators.gym import Simulator

ROBOT = "aloha_sim"
PACKAGES = ("gym-aloha==0.1.5",)
TASKS = {"transfer_cube": "Transfer cube", "insertion": "Insert the peg into the socket."}
"""Task to its instruction; the first is openpi's, the second LeRobot's."""


def make(*, tasks: str = "transfer_cube", steps: int = 300, prompt: str = "", fast: bool = False) -> Simulator:
    """ALOHA as a simulator.

    `tasks` is transfer_cube, insertion, or both with a comma between them. `steps` is the limit of an episode. `prompt`
    is another instruction, such as LeRobot's "Pick up the cube with the right arm and transfer it to the left arm."
    With `fast` pictures have neither shadows nor multisampling, which is not how published policies saw them.
    """
    names = tuple(tasks.split(","))
    if unknown := sorted(set(names) - set(TASKS)):
        raise UserError(f"tasks has {unknown}; expected some of {', '.join(TASKS)}.")
    return Simulator(
        make=lambda task: AlohaEnv(task, steps, fast),
        robot=ROBOT,
        fps=50,
        tasks=names,
        observe=lambda env, state: {
            "images": {"base_0_rgb": env.render()},
            "state": state,
            "prompt": prompt or TASKS[env.task],
        },
        success=lambda info: info["is_success"],
        expert=lambda env, state: env.expert.act(),
        per_task=50,
    )


class AlohaEnv:
    """One of gym-aloha's environments, which draws when it is asked to; observations are the 14 joints."""

    def __init__(self, task: str, steps: int, fast: bool):
        import gym_aloha.env  # type: ignore[import-not-found]
        from dm_control.rl.control import PhysicsError  # type: ignore[import-not-found]

        from pi0_jax.evaluate.simulators.aloha.expert import Expert

        self._diverged = PhysicsError
        self.task, self._limit = task, steps
        self._env: Any = gym_aloha.env.AlohaEnv(task, obs_type="pixels_agent_pos")
        inner, blank = self._env._env, {"top": np.empty(0)}
        inner.task.get_observation = lambda physics: {"qpos": inner.task.get_qpos(physics), "images": blank}
        self.action_space, self.physics = self._env.action_space, inner.physics
        self.expert = Expert(task, self.physics.model.ptr, self.physics.data.ptr)
        if fast:
            model = self.physics.model
            model.light_castshadow[:] = model.vis.quality.shadowsize = model.vis.quality.offsamples = 0

    def reset(self, *, seed: int, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self._steps = 0
        seen, info = self._env.reset(seed=seed)
        self.expert.begin()
        self._last = seen["agent_pos"].astype(np.float32)
        return self._last, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        try:
            seen, reward, terminated, _, info = self._env.step(np.asarray(action))
        except self._diverged:  # such actions are a failure of the policy
            return self._last, 0.0, False, True, {"is_success": False}
        self._last = seen["agent_pos"].astype(np.float32)
        self._steps += 1
        return self._last, reward, terminated, self._steps >= self._limit, info

    def render(self) -> np.ndarray:
        return self.physics.render(height=480, width=640, camera_id="top")

    def close(self) -> None:
        self.physics.free()
