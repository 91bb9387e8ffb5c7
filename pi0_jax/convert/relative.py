"""Relative actions as LeRobot keeps them: which are, by their names, in config.json and in the processors.

LeRobot adds the state's value of the same index to each action of a chunk, but for those whose name contains a word of
`exclude_joints`, in lower case.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pi0_jax.convert.formats import OpenCheckpoint
from pi0_jax.data.normalization import semantics_from_json
from pi0_jax.data.poses import Poses
from pi0_jax.data.robot_json import kept_robot
from pi0_jax.data.robots import Robot
from pi0_jax.errors import UserError


class Relative(NamedTuple):
    """The relative actions of a policy."""

    count: int
    """Dimensions that are differences to the state."""
    names: list[str] | None = None
    """What LeRobot is to call the actions, so that it adds the state to those and no others; None: it cannot."""
    excluded: tuple[str, ...] = ()
    """Of these, the ones that are no differences."""
    reason: str = ""
    """Why it cannot."""


def relative_actions(opened: OpenCheckpoint) -> Relative:
    """Which actions of a policy are relative, and whether LeRobot can add the state to them."""
    robot = robot_of(opened)
    name = opened.policy.robot if robot is None else robot.name
    meaning = {**opened.policy.action_semantics, **semantics_from_json(opened.norm_stats or {})}
    kinds = meaning.get(name, () if robot is None else robot.semantics)
    relative = [kind in ("relative", "angle") for kind in kinds]
    if not any(relative):
        return Relative(0)
    if robot is None:
        return Relative(sum(relative), reason=f"the names of the actions of {name} are not known here")
    if robot.poses != Poses():
        return Relative(sum(relative), reason="poses are relative in SE(3), and their rotations six numbers")
    if len(robot.state) < len(robot.actions):
        return Relative(sum(relative), reason="there are fewer states than actions, which LeRobot cannot add")
    for numbered in (False, True):  # a name may be part of another one
        names = [f"{i:03d}_{name}" if numbered else name for i, name in enumerate(robot.actions)]
        excluded = tuple(name for name, own in zip(names, relative, strict=True) if not own)
        if relative == [not any(word.lower() in name.lower() for word in excluded) for name in names]:
            return Relative(sum(relative), names, excluded)
    return Relative(sum(relative), reason="LeRobot tells actions apart by their names, and some are alike")


def robot_of(opened: OpenCheckpoint) -> Robot | None:
    """The robot of a policy; None where it is not known here. Of one that a checkpoint keeps, without its `adapt`."""
    kept: dict[str, Any] | None = None if opened.robot is None else {**opened.robot, "adapt": None}
    try:
        return kept_robot(opened.policy.robot, kept)
    except (UserError, FileNotFoundError):
        return None


def converts_units(opened: OpenCheckpoint) -> bool:
    """Whether the robot's units are others than those of the weights."""
    if opened.robot is not None:
        return opened.robot["adapt"] is not None
    robot = robot_of(opened)
    return robot is not None and robot.adapt is not None
