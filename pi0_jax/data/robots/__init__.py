"""Robots: their cameras, states and actions, and their names elsewhere. One file per robot sets `ROBOT`.

A built-in robot is a file of this folder, found by its name; a robot of your own is a file anywhere. State and actions
are in the robot's own units here; `pi0_jax.data.transform` converts them, by the robot's `adapt` too.
"""

from __future__ import annotations

import dataclasses
import importlib
import runpy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pi0_jax.data.poses import Pose as Pose
from pi0_jax.data.poses import Poses, check_poses, model_names, no_rotation
from pi0_jax.data.raw import RawObservation as RawObservation
from pi0_jax.errors import UserError, did_you_mean

SEMANTICS = ("absolute", "gripper", "relative", "angle")
"""What an action dimension means. absolute: used as it is. gripper: absolute too, an opening or a command of it.
relative: the model predicts its difference to the state's dimension of the same index when the chunk begins.
angle: relative as well, in radians, where the difference is brought to (-π, π]."""

ROBOTS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))
"""Names of the built-in robots: the files of this folder."""


class Planar(NamedTuple):
    """Dimensions that are x and y of one vector in the plane, for the square's symmetries (`data.augment`)."""

    state: tuple[tuple[int, int], ...]
    """Pairs (index of x, index of y) of the state; positions are relative to the centre of the scene."""
    actions: tuple[tuple[int, int], ...]
    """The same for actions."""


class Grippers(NamedTuple):
    """Values of grippers when they are open and when they are closed, by the names of their dimensions."""

    state: Mapping[str, tuple[float, float]] = {}
    """Such as {"gripper": (0.0, 1.0)} for one that is 0 open and 1 closed."""
    actions: Mapping[str, tuple[float, float]] = {}
    """The same for actions."""


class Adapter(NamedTuple):
    """Conversion from a robot's own units to those of the model's weights, and back; functions on `[*b d]`."""

    state: Callable[[np.ndarray], np.ndarray]
    state_inverse: Callable[[np.ndarray], np.ndarray]
    actions: Callable[[np.ndarray], np.ndarray]
    actions_inverse: Callable[[np.ndarray], np.ndarray]


class Clients(NamedTuple):
    """Names that clients and benchmarks of other projects use for a robot (`pi0_jax.serving`)."""

    cameras: Mapping[str, str] = {}
    """Name in openpi's clients → camera of the model, beside the last words of the dataset's features."""
    unused_cameras: tuple[str, ...] = ()
    """Cameras that openpi's clients send and no policy reads."""
    state: tuple[str, ...] = ("observation/joint_position", "observation/gripper_position")
    """Keys of the pieces that a state may be sent in."""
    reset_pose: tuple[float, ...] | None = None
    """Pose that openpi's client moves each arm to before an episode, radians."""
    action_spec: Mapping[str, str] = {}
    """Groups of actions for vla-eval, in order: name → specification in its `specs`; empty: raw actions."""
    action_space: str | None = None
    """RoboArena's name of the actions; None: the robot is none of RoboArena's."""


class RldsNames(NamedTuple):
    """Where a published RLDS dataset of a robot keeps what a policy needs."""

    keys: Mapping[str, str]
    """Name that the robot uses → feature of the dataset; " + " puts several side by side."""
    fps: int | float
    task: str = "language_instruction"
    """Feature with the instruction of each step."""
    only: str | None = None
    """Regular expression that the episode's `file_path` has to contain."""

    @property
    def features(self) -> set[str]:
        """The dataset's features that `keys` name."""
        return {feature.strip() for names in self.keys.values() for feature in names.split("+")}


@dataclasses.dataclass(frozen=True)
class Robot:
    """A robot as the policy meets it."""

    name: str
    cameras: dict[str, str]
    """Feature name in the dataset → camera name in the model. Order and choice are `ModelConfig.cameras`."""
    state: tuple[str, ...]
    """Names of the state's dimensions."""
    actions: tuple[str, ...]
    """Names of the action's dimensions."""
    fps: int | float | None
    """Control rate, actions per second; None where it differs from one set-up to the next."""
    image_size: tuple[int, int]
    """Height and width of the images, pixels, in `example` only: other sizes are resized."""
    planar: Planar | None = None
    """None where the symmetries of the square mean nothing."""
    semantics: tuple[str, ...] = ()
    """One of `SEMANTICS` per action; empty: all absolute."""
    poses: Poses = Poses()
    """Which dimensions are poses, such as Poses(state=(Pose(0, "quaternion_xyzw"),), actions=(Pose(0, "euler_xyz"),)).
    The model has nine dimensions for each. `relative` for all dimensions of one is relative in SE(3): position and
    rotation in the frame of the state's pose when the chunk begins."""
    adapt: Adapter | None = None
    """Conversion to the units of the weights; None: they are the robot's. Poses are found in what it returns."""
    grippers: Grippers = Grippers()
    """Range and polarity of the grippers, which `pi0 data check` holds a dataset against; empty: not known."""
    changes: tuple[str, ...] = ()
    """Actions that are a change or a velocity, by name: the robot holds still at 0 of them, and where it is at the
    last of the others."""
    velocities: tuple[str, ...] = ()
    """Those of `changes` that are velocities, by name. At another rate (`data.resample_fps`) a change is the sum of
    those of its time, and a velocity their mean."""
    clients: Clients = dataclasses.field(default_factory=Clients)
    """Names in other projects' clients and benchmarks."""
    rlds: RldsNames | None = None
    """Names in the robot's published RLDS dataset, the preset of the robot's name in `DatasetConfig`."""

    @property
    def model_state(self) -> tuple[str, ...]:
        """Names of the state's dimensions in the model: the robot's but for rotations, which are six columns there."""
        return model_names(self.state, self.poses.state)

    @property
    def model_actions(self) -> tuple[str, ...]:
        """The same of the action's."""
        return model_names(self.actions, self.poses.actions)

    def select_cameras(self, cameras: Collection[str]) -> dict[str, str]:
        """The robot's cameras among `cameras` of a model: feature of the dataset → camera of the model."""
        return {feature: camera for feature, camera in self.cameras.items() if camera in cameras}

    def example(self) -> RawObservation:
        """A valid raw observation, all zeros, and no rotation in poses."""
        return {
            "images": {camera: np.zeros((*self.image_size, 3), np.uint8) for camera in self.cameras.values()},
            "state": _zeros(len(self.state), self.poses.state),
            "prompt": "do nothing",
        }

    def example_action(self) -> np.ndarray:
        """A valid action, all zeros, and no rotation in poses, `[d]`."""
        return _zeros(len(self.actions), self.poses.actions)

    def still(self, last: np.ndarray) -> np.ndarray:
        """The action that holds the robot where the action `last` brought it."""
        return np.where([name in self.changes for name in self.actions], 0.0, last).astype(np.float32)


def _zeros(width: int, poses: tuple[Pose, ...]) -> np.ndarray:
    values = np.zeros(width, np.float32)
    for pose in poses:
        values[pose.start + 3 : pose.end] = no_rotation(pose)
    return values


def get_robot(name: str) -> Robot:
    """The robot called `name`, or the one that a Python file defines.

    Raises:
        UserError: no name, there is no such robot, or the file defines none, or one that contradicts itself.
        FileNotFoundError: there is no such file.
    """
    own = "For a robot of your own, `pi0 data robot PATH` writes its file from a LeRobot dataset: docs/your_robot.md."
    if not name:
        raise UserError(f"`policy.robot` names no robot. Set it to one of {', '.join(ROBOTS)}, or to a file. {own}")
    if not name.endswith(".py") and name not in ROBOTS:
        raise UserError(
            f"there is no robot {name!r}.{did_you_mean(name, ROBOTS)} The robots are {', '.join(ROBOTS)}. {own}"
        )
    path = Path(name) if name.endswith(".py") else Path(__file__).with_name(f"{name}.py")
    if not path.is_file():
        raise FileNotFoundError(f"there is no robot file {path}. docs/your_robot.md says what is in one.")
    if path.parent == Path(__file__).parent:
        robot = vars(importlib.import_module(f"{__name__}.{path.stem}"))["ROBOT"]
    else:
        robot = runpy.run_path(str(path)).get("ROBOT")
    if not isinstance(robot, Robot):
        raise UserError(f"{path} sets no `ROBOT` of type pi0_jax.data.robots.Robot. See docs/your_robot.md.")
    return check_robot(robot)


def semantics_of(robot: Robot, override: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The meaning of each action dimension: by `override` for the robot's name, or as the robot declares.

    Raises:
        UserError: another number of dimensions, an unknown word, or one relative to a state that is not there; or a
            pose whose dimensions have several meanings.
    """
    chosen = tuple(override.get(robot.name) or robot.semantics or ("absolute",) * len(robot.actions))
    if len(chosen) != len(robot.actions):
        raise UserError(f"{robot.name} has {len(robot.actions)} actions, and semantics for {len(chosen)}: {chosen}.")
    if unknown := sorted(set(chosen) - set(SEMANTICS)):
        raise UserError(f"{robot.name} has actions of semantics {unknown}; expected one of {SEMANTICS}.")
    posed = _check_relative_poses(robot, chosen)
    for number, kind in enumerate(chosen):
        if kind not in ("relative", "angle") or number in posed:
            continue
        if any(pose.start <= number < pose.end for pose in robot.poses.state):
            raise UserError(
                f"action {robot.actions[number]!r} of {robot.name} is {kind} to state {number}, "
                f"{robot.state[number]!r}, which is part of a pose. Bring the state into the order of the actions."
            )
        if number >= len(robot.state):
            raise UserError(
                f"action {robot.actions[number]!r} of {robot.name} is {kind} to state {number}, and there are only "
                f"{len(robot.state)}. Bring the state into the order of the actions."
            )
    return chosen


def _check_relative_poses(robot: Robot, semantics: tuple[str, ...]) -> set[int]:
    """The action dimensions that belong to poses, each of which has one meaning, and a state's pose if relative."""
    posed: set[int] = set()
    for number, pose in enumerate(robot.poses.actions):
        kinds = set(semantics[pose.start : pose.end])
        names = list(robot.actions[pose.start : pose.end])
        if kinds not in ({"relative"}, {"absolute"}):
            raise UserError(
                f"actions {names} of {robot.name} are a pose and of semantics {sorted(kinds)}; expected 'relative' for "
                "all of them, or 'absolute'."
            )
        if kinds == {"relative"} and number >= len(robot.poses.state):
            raise UserError(
                f"actions {names} of {robot.name} are a relative pose, number {number} counted from 0; the state has "
                f"{len(robot.poses.state)} poses. Say in `poses` where the state has the one that they are relative to."
            )
        posed |= set(range(pose.start, pose.end))
    return posed


def check_robot(robot: Robot) -> Robot:
    """The robot, if it is consistent; errors as of `semantics_of`."""
    for key, poses, names in (
        ("state", robot.poses.state, robot.state),
        ("actions", robot.poses.actions, robot.actions),
    ):
        check_poses(poses, names, f"{robot.name}'s {key}")
    if robot.planar is not None and robot.poses != Poses():
        raise UserError(f"{robot.name} has planar axes and poses; the symmetries of the square do not turn poses.")
    semantics_of(robot, {})
    for key, names in (("state", robot.state), ("actions", robot.actions), ("cameras", robot.cameras.values())):
        if len(set(names)) != len(tuple(names)):
            raise UserError(f"{robot.name} has names twice among its {key}: {list(names)}.")
    for key, names in (("state", robot.state), ("actions", robot.actions)):
        if unknown := sorted(set(getattr(robot.grippers, key)) - set(names)):
            raise UserError(f"{robot.name} has no {key} {unknown} that could be grippers; it has {list(names)}.")
    if unknown := sorted(set(robot.changes) - set(robot.actions)):
        raise UserError(f"{robot.name} has no actions {unknown} that could be changes; it has {list(robot.actions)}.")
    if unknown := sorted(set(robot.velocities) - set(robot.changes)):
        raise UserError(f"{robot.name} has velocities {unknown} that are not among its `changes`, {robot.changes}.")
    return robot
