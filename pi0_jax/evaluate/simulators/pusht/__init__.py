"""PushT (Chi et al. 2023, arXiv 2303.04137; gym-pusht): a disc pushes a T onto its outline, seen from above.

As LeRobot has it: pictures of 96 pixels, state and action are positions of the disc in pixels of the 512 × 512 board,
at most 300 steps at 10 per second, success from 95 % coverage on. Its packages: pi0 env install pusht.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pi0_jax.evaluate.simulators.gym import Simulator
from pi0_jax.evaluate.simulators.pusht.expert import Expert

ROBOT = "pusht"
PACKAGES = ("gym-pusht==0.1.8", "pymunk<7", "scipy>=1.10")


def make(*, image_size: int = 96) -> Simulator:
    """PushT as a simulator; `image_size` is the side of the images, pixels."""
    return Simulator(
        make=lambda task: PushEnv(image_size),
        robot=ROBOT,
        fps=10,
        tasks=("push_t",),
        observe=lambda env, state: {
            "images": {"base_0_rgb": env.draw()},
            "state": state[:2].astype(np.float32),
            "prompt": "Push the T-shaped block onto the T-shaped target.",
        },
        success=lambda info: info["is_success"],
        picture=lambda env: env.draw(large=True),
        expert=lambda env, state: env.expert.act(state[:2], state[2:]),
        per_task=500,
    )


class PushEnv:
    """gym-pusht's environment, which draws when it is asked to; it observes the disc's position and the T's pose."""

    def __init__(self, image_size: int):
        import gym_pusht  # type: ignore[import-not-found]  # noqa: F401  (registers the environment)
        import gymnasium

        sides = {"observation": image_size, "visualization": 384}
        size: Any = {f"{kind}_{axis}": side for kind, side in sides.items() for axis in ("width", "height")}
        self._env: Any = gymnasium.make("gym_pusht/PushT-v0", obs_type="state", **size)
        self.action_space = self._env.action_space

    def reset(self, *, seed: int, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.expert = Expert(np.random.default_rng((seed, 2)))
        return self._env.reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._env.step(action)

    def draw(self, large: bool = False) -> np.ndarray:
        return self._env.unwrapped._render(visualize=large)

    def close(self) -> None:
        self._env.close()
