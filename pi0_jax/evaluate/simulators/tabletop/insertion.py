"""A precise task: the ring has to be lowered over a puck that leaves it a few millimetres of play.

A ring that lands on the puck is stuck there, which ends the episode: there is one try.
"""

from __future__ import annotations

import numpy as np

from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.single import SingleTaskEnv

PLAY = 0.002
"""Room between the puck and the ring around it, metres. The round ends of the posts guide the ring on from
`PLAY + POST_RADIUS`, 7 mm, and no farther."""
PUCK_RADIUS, PUCK_HEIGHT = scene.RING_RADIUS - scene.POST_RADIUS - PLAY, 0.024
HALF_SPREAD, OFFSET = 0.12, 0.08
"""The puck is within HALF_SPREAD of the table's centre, the ring starts within OFFSET of it, x and y, metres."""
TRAVEL_HEIGHT, LOW_HEIGHT = 0.06, float(scene.COMMAND_LOW[2])
DONE_HEIGHT = 0.014
"""Height of a ring that is over the puck, metres."""
STUCK = 0.01
"""The ring is this much higher than it is told to be when something holds it, metres."""


class InsertionEnv(SingleTaskEnv):
    """A ring, and a green puck that stands fast and just fits into it."""

    name = "insertion"
    prompts = ("lower the ring over the green puck",)
    things = f"""
    <body name="puck" mocap="true">
      <geom type="cylinder" pos="0 0 {PUCK_HEIGHT / 2}" size="{PUCK_RADIUS} {PUCK_HEIGHT / 2}" contype="1"
            conaffinity="3" friction="0.5" rgba="0 0.8 0.15 1"/>
    </body>"""

    def _layout(self, rng: np.random.Generator) -> np.ndarray:
        self.puck = rng.uniform(-HALF_SPREAD, HALF_SPREAD, 2)
        return np.array([*(self.puck + rng.uniform(-OFFSET, OFFSET, 2)), rng.uniform(TRAVEL_HEIGHT, 0.1)])

    def _positions(self) -> list[np.ndarray]:
        return [self.puck]

    def _judge(self) -> None:
        height = self._tool[2]
        self.success = bool(height < DONE_HEIGHT)
        self.failed = bool(height < PUCK_HEIGHT + STUCK and height - self._data.ctrl[2] > STUCK and not self.success)

    def expert(self) -> np.ndarray:
        """Goes above the puck, and straight down once it is centred."""
        move = self.puck - self._data.ctrl[:2]
        distance = float(np.linalg.norm(self.puck - self._tool[:2]))
        height = LOW_HEIGHT if distance < PLAY else TRAVEL_HEIGHT
        return self._action(move, height)
