"""A moving target, which punishes delay: the ring has to stay over a circle that wanders about.

The circle has a dark spot in front, so that one image tells where it goes next; when it turns nothing tells before. A
robot that holds still while its policy computes is left behind.
"""

from __future__ import annotations

import numpy as np

from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.single import SingleTaskEnv

SPEED = 0.016
"""Of the circle, metres per control step."""
TURN_RATE, TURN = 0.12, 1.6
"""Probability that the circle turns at a control step, and the most it turns then, radians."""
HALF_SPREAD, OFFSET = 0.15, 0.1
"""The circle stays within HALF_SPREAD of the table's centre, the ring starts within OFFSET of it, x and y, metres."""
NEAR, HOLD = 0.02, 8
"""The task is done when the ring's axis was this near the circle's centre, metres, for so many control steps on end."""
HEIGHT = 0.05


class ChaseEnv(SingleTaskEnv):
    """A ring, and a yellow circle that moves at constant speed, turns now and then, and turns back at the borders."""

    name = "chase"
    prompts = ("follow the yellow circle",)
    things = f"""{scene.goal_xml(0.04)}
    <body name="front" mocap="true">
      <geom class="drawing" size="0.016 0.001" rgba="0.1 0.1 0.6 1"/>
    </body>"""

    def _layout(self, rng: np.random.Generator) -> np.ndarray:
        self.target = rng.uniform(-HALF_SPREAD, HALF_SPREAD, 2)
        self._head(rng.uniform(-np.pi, np.pi))
        self._held = 0
        return np.array([*(self.target + rng.uniform(-OFFSET, OFFSET, 2)), HEIGHT])

    def _head(self, angle: float) -> None:
        self.velocity = SPEED * np.array([np.cos(angle), np.sin(angle)])

    def _positions(self) -> list[np.ndarray]:
        return [self.target, self.target + self.velocity / SPEED * 0.024]

    def _move(self) -> None:
        """The circle goes on as its front says, and then turns: the observation tells of the turn."""
        self.target = np.clip(self.target + self.velocity, -HALF_SPREAD, HALF_SPREAD)
        rng = self.np_random
        if rng.random() < TURN_RATE:
            self._head(np.arctan2(*self.velocity[::-1]) + rng.uniform(-TURN, TURN))
        outside = np.abs(self.target + self.velocity) > HALF_SPREAD
        self.velocity = np.where(outside, -np.sign(self.target) * np.abs(self.velocity), self.velocity)
        self._place()

    def _judge(self) -> None:
        near = np.linalg.norm(self._tool[:2] - self.target) < NEAR
        self._held = self._held + 1 if near else 0
        self.success = self._held >= HOLD

    def expert(self) -> np.ndarray:
        """Goes where the circle will be after this step."""
        move = self.target + self.velocity - self._data.ctrl[:2]
        return self._action(move, HEIGHT)
