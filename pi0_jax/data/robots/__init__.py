"""Robots: what each one's cameras, state and actions are. One file a robot; `get_robot` finds it by name.

State and actions are in the robot's own units here. Normalisation and padding come after (`pi0_jax.data.transform`).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NamedTuple

import numpy as np


class Planar(NamedTuple):
    """Which dimensions are x and y of one vector in the plane, for the square's symmetries (`data.augment`)."""

    state: tuple[tuple[int, int], ...]
    """Pairs (index of x, index of y) of the state; positions are relative to the centre of the scene."""
    actions: tuple[tuple[int, int], ...]
    """The same for actions."""


@dataclasses.dataclass(frozen=True)
class Robot:
    """A robot as the policy meets it.

    A raw observation of it is a dict: `images` by model camera name, uint8 RGB `[h, w, 3]`; `state` `[d]` in the
    robot's units; `prompt`, the instruction.
    """

    name: str
    cameras: dict[str, str]
    """Feature name in the dataset → camera name in the model. Order and choice are `ModelConfig.cameras`."""
    state: tuple[str, ...]
    """Names of the state's dimensions."""
    actions: tuple[str, ...]
    """Names of the action's dimensions."""
    fps: int
    """Control rate, actions a second."""
    image_size: tuple[int, int]
    """Height and width of the images, pixels, in `example` only: other sizes are resized."""
    planar: Planar | None = None
    """None where the symmetries of the square mean nothing."""

    def example(self) -> dict[str, Any]:
        """A valid raw observation, all zeros."""
        return {
            "images": {camera: np.zeros((*self.image_size, 3), np.uint8) for camera in self.cameras.values()},
            "state": np.zeros(len(self.state), np.float32),
            "prompt": "do nothing",
        }


def get_robot(name: str) -> Robot:
    """The robot called `name`.

    Raises:
        ValueError: there is none of that name.
    """
    from pi0_jax.data.robots.tabletop import TABLETOP

    robots = {robot.name: robot for robot in (TABLETOP,)}
    if name not in robots:
        match = difflib.get_close_matches(name, robots, n=1)
        raise ValueError(
            f"there is no robot {name!r}{f' (did you mean {match[0]!r}?)' if match else ''}; the robots are "
            f"{sorted(robots)}. A new one is a file in pi0_jax/data/robots."
        )
    return robots[name]
