"""The robot of a checkpoint: what a robot's own file says of it, as JSON beside the weights.

So a policy can be served where that file is not, and is served as it was trained where the file has changed since.
Conversions of units (`adapt`) are code, and loading a checkpoint never runs code that comes with it: the JSON has what
they made of some vectors, and the file, of which the checkpoint keeps a copy to read, has to make the same of them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax.data.robots import Robot, check_robot, get_robot
from pi0_jax.errors import UserError

SOURCE = "source"
"""Key of the text of the robot's file."""


def robot_to_json(name: str) -> dict[str, Any] | None:
    """What a checkpoint keeps of a robot that a file describes; None for one that comes with this package.

    Raises:
        UserError, FileNotFoundError: as of `get_robot`.
    """
    robot = get_robot(name)
    if not name.endswith(".py"):
        return None
    fields = {field.name: _to_json(getattr(robot, field.name)) for field in dataclasses.fields(robot)}
    return fields | {"adapt": _adapted(robot), SOURCE: Path(name).read_text()}


def kept_robot(name: str, content: dict[str, Any] | None) -> Robot:
    """The robot of a checkpoint.

    Args:
        name: as its configuration has it.
        content: what `robot_to_json` gave; None: nothing was kept, and the robot is that of `get_robot`.

    Raises:
        FileNotFoundError: it converts units, and its file is not here; the message says where a copy is.
        UserError: that file converts them otherwise than it did; or the JSON is of another version.
    """
    if content is None:
        return get_robot(name)
    hints = typing.get_type_hints(Robot)
    try:
        known = {name: _from_json(hints[name], content[name]) for name in hints if name != "adapt"}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's robot.json does not fit this version of pi0_jax: {error!r}.") from error
    robot = check_robot(Robot(**known))
    if content.get("adapt") is None:
        return robot
    copy = (
        f"assets/robot.py of the checkpoint is a copy of the file it was trained with: read it, and copy it to {name}"
    )
    try:
        own = get_robot(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} {robot.name} converts units by code (`adapt`), which is never run from a checkpoint. {copy}."
        ) from error
    robot = dataclasses.replace(robot, adapt=own.adapt)
    if _adapted(robot) != content["adapt"]:
        raise UserError(
            f"`adapt` of {name} does not convert units as it did when this policy was trained, so its actions would be "
            f"wrong. {copy} under another name to compare them."
        )
    return robot


def _to_json(value: Any) -> Any:
    """A field as JSON has it: named tuples are objects."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Mapping):
        return {key: _to_json(each) for key, each in value.items()}
    return [_to_json(each) for each in value] if isinstance(value, tuple) else value


def _from_json(kind: Any, value: Any) -> Any:
    """The inverse of `_to_json`, for a field of a type."""
    if typing.get_origin(kind) is types.UnionType:
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    inner = typing.get_args(kind)
    if isinstance(value, dict):
        if hasattr(kind, "_fields"):
            return kind(**{name: _from_json(hint, value[name]) for name, hint in typing.get_type_hints(kind).items()})
        return {key: _from_json(inner[1], each) for key, each in value.items()}
    if not isinstance(value, list):
        return value
    kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
    return tuple(_from_json(each, item) for each, item in zip(kinds, value, strict=True))


def _adapted(robot: Robot) -> dict[str, list[list[float | None]]] | None:
    """What the conversions make of two vectors, to six digits; None where there are none."""
    if robot.adapt is None:
        return None
    found = {}
    for name, convert in robot.adapt._asdict().items():
        width = len(robot.state if name.startswith("state") else robot.actions)
        values = np.asarray(convert(np.stack([np.zeros(width), 0.1 + 0.4 * np.arange(width) / width])), np.float64)
        found[name] = [[float(f"{x:.6g}") if np.isfinite(x) else None for x in row] for row in values.tolist()]
    return found
