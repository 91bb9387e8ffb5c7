"""Robots: what each one's cameras, state and actions are. One file a robot; `get_robot` finds it by name.

State and actions are in the robot's own units here. What follows, the robot's `adapt` included, is the transforms'
(`pi0_jax.data.transform`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SEMANTICS = ("absolute", "gripper", "relative", "angle")
"""What an action dimension means. absolute: used as it is. gripper: absolute too, an opening or a command of it.
relative: the model predicts its difference to the state's dimension of the same index when the chunk begins.
angle: relative as well, in radians, where the difference is brought to (-π, π]."""

ROBOTS = (
    "aloha", "bridge", "droid", "droid_velocity", "fractal", "libero", "metaworld", "so100", "so101", "tabletop", "ur5",
)  # fmt: skip
"""Names of the robots here; each is the file of its name, but for those in `_FILES`."""
_FILES = {"droid_velocity": "droid", "so101": "so100"}


class Planar(NamedTuple):
    """Which dimensions are x and y of one vector in the plane, for the square's symmetries (`data.augment`)."""

    state: tuple[tuple[int, int], ...]
    """Pairs (index of x, index of y) of the state; positions are relative to the centre of the scene."""
    actions: tuple[tuple[int, int], ...]
    """The same for actions."""


class Adapter(NamedTuple):
    """From a robot's own units to those that the model's weights know, and back; functions on `[*b d]`."""

    state: Callable[[np.ndarray], np.ndarray]
    state_inverse: Callable[[np.ndarray], np.ndarray]
    actions: Callable[[np.ndarray], np.ndarray]
    actions_inverse: Callable[[np.ndarray], np.ndarray]


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
    fps: float | None
    """Control rate, actions a second; None where it differs from one set-up to the next."""
    image_size: tuple[int, int]
    """Height and width of the images, pixels, in `example` only: other sizes are resized."""
    planar: Planar | None = None
    """None where the symmetries of the square mean nothing."""
    semantics: tuple[str, ...] = ()
    """One of `SEMANTICS` for each action; empty: all absolute."""
    adapt: Adapter | None = None
    """Conversion to the units of the weights; None: they are the robot's."""
    changes: tuple[str, ...] = ()
    """Actions that are a change or a velocity, by name: the robot holds still at 0 of them, and where it is at the
    last of the others."""

    def example(self) -> dict[str, Any]:
        """A valid raw observation, all zeros."""
        return {
            "images": {camera: np.zeros((*self.image_size, 3), np.uint8) for camera in self.cameras.values()},
            "state": np.zeros(len(self.state), np.float32),
            "prompt": "do nothing",
        }

    def still(self, last: np.ndarray) -> np.ndarray:
        """The action that holds the robot where the action `last` brought it."""
        return np.where([name in self.changes for name in self.actions], 0.0, last).astype(np.float32)


def get_robot(name: str) -> Robot:
    """The robot called `name`, or the one that a Python file defines.

    Args:
        name: one of `ROBOTS`, or the path of a file ending in .py that sets `ROBOT`.

    Raises:
        ValueError: there is none of that name, or the file defines none, or one that contradicts itself.
        FileNotFoundError: there is no such file.
    """
    if name.endswith(".py"):
        return check_robot(_from_file(Path(name)))
    if name not in ROBOTS:
        match = difflib.get_close_matches(name, ROBOTS, n=1)
        raise ValueError(
            f"there is no robot {name!r}{f' (did you mean {match[0]!r}?)' if match else ''}; the robots are "
            f"{sorted(ROBOTS)}. A robot of your own is a file: docs/your_robot.md."
        )
    module = importlib.import_module(f"pi0_jax.data.robots.{_FILES.get(name, name)}")
    return getattr(module, name.upper())


def semantics_of(robot: Robot, override: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What each action dimension means: as `override` says for the robot's name, or as the robot declares.

    Raises:
        ValueError: another number of dimensions, an unknown word, or one relative to a state that is not there.
    """
    chosen = tuple(override.get(robot.name) or robot.semantics or ("absolute",) * len(robot.actions))
    if len(chosen) != len(robot.actions):
        raise ValueError(f"{robot.name} has {len(robot.actions)} actions, and semantics for {len(chosen)}: {chosen}.")
    if unknown := sorted(set(chosen) - set(SEMANTICS)):
        raise ValueError(f"{robot.name} has actions of semantics {unknown}; expected one of {SEMANTICS}.")
    for number, kind in enumerate(chosen):
        if kind in ("relative", "angle") and number >= len(robot.state):
            raise ValueError(
                f"action {robot.actions[number]!r} of {robot.name} is {kind} to state {number}, and there are only "
                f"{len(robot.state)}. Bring the state into the order of the actions."
            )
    return chosen


def check_robot(robot: Robot) -> Robot:
    """The robot, if it is consistent; errors as of `semantics_of`."""
    semantics_of(robot, {})
    for key, names in (("state", robot.state), ("actions", robot.actions), ("cameras", robot.cameras.values())):
        if len(set(names)) != len(tuple(names)):
            raise ValueError(f"{robot.name} has names twice among its {key}: {list(names)}.")
    if unknown := sorted(set(robot.changes) - set(robot.actions)):
        raise ValueError(f"{robot.name} has no actions {unknown} that could be changes; it has {list(robot.actions)}.")
    return robot


def _from_file(path: Path) -> Robot:
    if not path.is_file():
        raise FileNotFoundError(f"there is no robot file {path}. docs/your_robot.md says what is in one.")
    robot = runpy.run_path(str(path)).get("ROBOT")
    if not isinstance(robot, Robot):
        raise ValueError(f"{path} sets no `ROBOT` of type pi0_jax.data.robots.Robot. See docs/your_robot.md.")
    return robot
