"""Tasks whose instruction does not say what to do next: to take two objects, the nearest first, besides to take one.

The ring takes an object by coming to rest over it: the object is gone from the table, so that one look tells what is
left to do. Taking what the instruction does not ask for ends the episode. A policy that ignores the instruction
succeeds in a third of the episodes at most.
"""

# pyright: reportAttributeAccessIssue=false
# (the checker does not see MuJoCo's compiled functions)

from __future__ import annotations

import itertools
from typing import Any

import mujoco
import numpy as np

from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.single import SingleTaskEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import OBJECTS

NEAR, REST = 0.04, 0.02
"""The ring takes an object this near its axis, if it moved less than this in a control step, metres."""
SPREAD, GAP = 0.12, 0.125
"""Objects and ring start within SPREAD of the table's centre, x and y, so that the camera at the ring sees all objects,
and at least GAP apart, metres: more than a quarter of that camera's picture, so that no patch of 12 of its 48 pixels
shows two whole objects. With 0.09 a small network did not learn which of them an instruction names."""
HEIGHT = 0.06
AWAY = np.array([2.0, 2.0])
"""Where taken objects are: out of sight."""
PHRASINGS = ("take {}", "fetch {}", "pick up {}")
TASKS = {
    "take_" + "_and_".join(names).replace(" ", "_"): names
    for count in (1, 2)
    for names in itertools.combinations(OBJECTS, count)
}
"""What is to be taken, by name: three tasks of one stage, and three of two."""


class StagesEnv(SingleTaskEnv):
    """A ring, and a red block, a green puck and a blue ball that it takes. `reset` knows `task`, one of `TASKS`, too;
    without it a task is drawn."""

    name = "stages"
    things = """
    <body name="block" mocap="true">
      <geom class="drawing" type="box" pos="0 0 0.024" size="0.024 0.024 0.024" rgba="0.95 0.05 0.05 1"/>
    </body>
    <body name="puck" mocap="true">
      <geom class="drawing" pos="0 0 0.015" size="0.028 0.015" rgba="0.0 0.80 0.15 1"/>
    </body>
    <body name="ball" mocap="true">
      <geom class="drawing" type="sphere" pos="0 0 0.026" size="0.026" rgba="0.05 0.15 1 1"/>
    </body>"""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As of `SingleTaskEnv`."""
        others = dict(options or {})
        self._asked = others.pop("task", None)
        if self._asked not in (None, *TASKS):
            raise UserError(f"no task is named {self._asked!r}; the tasks are {', '.join(TASKS)}.")
        return super().reset(seed=seed, options=others)

    def _layout(self, rng: np.random.Generator) -> np.ndarray:
        drawn = [*TASKS][rng.integers(len(TASKS))]
        self.name = self._asked or drawn
        self.wanted = [*TASKS[self.name]]
        orders = [" and ".join(f"the {name}" for name in order) for order in itertools.permutations(self.wanted)]
        self.prompts = tuple(phrase.format(order) for phrase in PHRASINGS for order in orders)
        *places, start = scene.sample_positions(rng, len(OBJECTS) + 1, SPREAD, GAP)
        self.objects = dict[str, np.ndarray](zip(OBJECTS, places, strict=True))
        self._before = start
        return np.array([*start, HEIGHT])

    def _positions(self) -> list[np.ndarray]:
        return [self.objects.get(name, AWAY) for name in OBJECTS]

    def _judge(self) -> None:
        now = self._tool[:2].copy()
        rests = np.linalg.norm(now - self._before) < REST
        self._before = now
        for name in [name for name, place in self.objects.items() if rests and np.linalg.norm(now - place) < NEAR]:
            del self.objects[name]
            self.failed |= name not in self.wanted
            self.wanted = [other for other in self.wanted if other != name]
            self._place()
            mujoco.mj_kinematics(self._model, self._data)
        self.success = not (self.wanted or self.failed)

    @property
    def _next(self) -> str:
        """Of the objects that are still to be taken the nearest."""
        return min(self.wanted, key=lambda name: float(np.linalg.norm(self.objects[name] - self._tool[:2])))

    @property
    def subtask(self) -> str:
        """What is to be done now."""
        return f"take the {self._next}"

    def expert(self) -> np.ndarray:
        """Goes straight to the next object, and rests there."""
        move = self.objects[self._next] - self._data.ctrl[:2]
        return self._action(move, HEIGHT)

    def questions(self) -> dict[str, str]:
        """Questions about the picture of the camera "tool", with their answers: how many hundredths of the picture an
        object is from the left, and from the top."""
        reach = scene.TOOL_CAMERA_REACH * (1 + HEIGHT / scene.TOOL_CAMERA_HEIGHT)  # on the table
        return {
            f"where is the {name}?": "{:.0f} {:.0f}".format(*(50 * (1 + (place - self._tool[:2]) * (1, -1) / reach)))
            for name, place in self.objects.items()
        }
