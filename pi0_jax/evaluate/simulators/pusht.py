"""PushT (Chi et al. 2023, arXiv 2303.04137; gym-pusht): a disc pushes a T onto its outline, seen from above.

As LeRobot has it: pictures of 96 pixels, state and action are positions of the disc in pixels of the 512 × 512 board,
at most 300 steps at 10 per second, success from 95 % coverage on. Its packages: pi0 env install pusht.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pi0_jax.evaluate.simulators.gym import Simulator

ROBOT = "pusht"
PACKAGES = ("gym-pusht==0.1.8", "pymunk<7")


def make(*, image_size: int = 96) -> Simulator:
    """PushT as a simulator; `image_size` is the side of the images, pixels."""

    def environment(task: str) -> Any:
        import gym_pusht  # type: ignore[import-not-found]  # noqa: F401  (registers the environment)
        import gymnasium

        sides = {"observation": image_size, "visualization": 384}
        size: Any = {f"{kind}_{axis}": side for kind, side in sides.items() for axis in ("width", "height")}
        return gymnasium.make("gym_pusht/PushT-v0", obs_type="state", **size)  # pictures are drawn when asked for

    return Simulator(
        make=environment,
        robot=ROBOT,
        fps=10,
        tasks=("push_t",),
        observe=lambda env, state: {
            "images": {"base_0_rgb": env.unwrapped._render()},
            "state": state[:2].astype(np.float32),
            "prompt": "Push the T-shaped block onto the T-shaped target.",
        },
        success=lambda info: info["is_success"],
        per_task=500,
    )
