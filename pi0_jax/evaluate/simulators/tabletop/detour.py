"""A task with two right answers: the ring has to pass a pillar, on either side, on its way to the yellow circle.

Demonstrations take either side with equal probability, whatever the layout. The mean of the two goes straight on, into
the pillar, and coming nearer to it than a centimetre ends the episode.
"""

from __future__ import annotations

import numpy as np

from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.single import SingleTaskEnv

PILLAR_RADIUS, KEEP_OFF = 0.015, 0.01
TOUCH = scene.RING_RADIUS + scene.POST_RADIUS + PILLAR_RADIUS + KEEP_OFF
"""Distance between the axes of ring and pillar below which the episode has failed, metres: ring and pillar are nearer
than KEEP_OFF."""
CLEARANCE = 0.015
"""Distance that the expert keeps besides, metres."""
START_DISTANCE, GOAL_DISTANCE = 0.18, 0.165
"""From the pillar to the ring at the start, and to the circle, metres."""
SPREAD, BEND = 0.02, 0.3
"""The pillar is up to SPREAD from the table's centre, x and y, and so is the ring from the line through pillar and
circle, metres. The way to the pillar is up to BEND from +y, and the way on to the circle up to BEND from that, in
radians."""
GOAL_REACH = 0.03
"""Distance of the ring's axis from the circle's centre at which it is there, metres."""
HEIGHT = 0.05
AHEAD = 0.5
"""Angle from straight behind the pillar within which the expert takes the side that was drawn, radians."""


def _turned(vector: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([cos * vector[0] - sin * vector[1], sin * vector[0] + cos * vector[1]])


def _distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """Of a point from the line from `start` to `end`."""
    along = end - start
    share = np.clip((point - start) @ along / max(float(along @ along), 1e-12), 0, 1)
    return float(np.linalg.norm(start + share * along - point))


class DetourEnv(SingleTaskEnv):
    """A ring, a pillar in its way, and a yellow circle behind it. The mode is the side: "left" or "right" as seen on
    the way to the circle."""

    name = "detour"
    prompts = ("go to the yellow circle",)
    things = f"""{scene.goal_xml(0.035)}
    <body name="pillar" mocap="true">
      <geom class="drawing" pos="0 0 0.08" size="{PILLAR_RADIUS} 0.08" rgba="0.95 0.05 0.05 1"/>
    </body>"""

    def _layout(self, rng: np.random.Generator) -> np.ndarray:
        forward = _turned(np.array([0.0, 1.0]), rng.uniform(-BEND, BEND))
        self.pillar = rng.uniform(-SPREAD, SPREAD, 2)
        self.goal = self.pillar + GOAL_DISTANCE * _turned(forward, rng.uniform(-BEND, BEND))
        sideways = rng.uniform(-SPREAD, SPREAD) * _turned(forward, np.pi / 2)
        start = self.pillar - START_DISTANCE * forward + sideways
        self.drawn = rng.choice([-1, 1])
        self._side, self._before = 0, start
        return np.array([*start, HEIGHT])

    def _positions(self) -> list[np.ndarray]:
        return [self.goal, self.pillar]

    @property
    def mode(self) -> str | None:
        return {0: None, 1: "left", -1: "right"}[self._side]

    def _angle(self, position: np.ndarray) -> float:
        """Of a position around the pillar, from the circle: positive on the left."""
        (x, y), (a, b) = self.goal - self.pillar, position - self.pillar
        return float(np.arctan2(x * b - y * a, x * a + y * b))

    def _judge(self) -> None:
        now = self._tool[:2].copy()
        self.failed = _distance(self.pillar, self._before, now) < TOUCH
        self.success = not self.failed and bool(np.linalg.norm(now - self.goal) < GOAL_REACH)
        self._before = now
        angle = self._angle(now)
        if abs(angle) < np.pi / 2:  # it is past the pillar
            self._side = self._side or (1 if angle > 0 else -1)

    def expert(self) -> np.ndarray:
        """Goes straight to the circle where the pillar is not in the way, and else past it on a side: its own if the
        ring is there already, else the one that was drawn."""
        command, angle = self._data.ctrl[:2], self._angle(self._data.ctrl[:2])
        away, orbit = command - self.pillar, TOUCH + CLEARANCE
        move = self.goal - command
        if _distance(self.pillar, command, self.goal) < orbit and abs(angle) > 0.3:
            side = self.drawn if abs(angle) > np.pi - AHEAD else np.sign(angle)
            distance = float(np.linalg.norm(away))
            # Along the tangent to the circle around the pillar; on that circle, along it; inside it, outward too.
            inward = np.arcsin(orbit / distance) if distance > orbit else np.pi / 2 + min(1.0, 20 * (orbit - distance))
            move = scene.MAX_ACTION * _turned(-away / distance, side * inward)
        return self._action(move, HEIGHT)
