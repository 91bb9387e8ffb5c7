"""Poses among the dimensions of a dataset, by their names, held against the numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pi0_jax.data.poses import Pose

LAST = re.compile(r"(?:^|[^a-z0-9])(q?[wxyz]|[rw][xyz]|roll|pitch|yaw)(?:[._](?:rad|m|pos))?$")
"""The end of a name that says which number of a position or a rotation it is."""
TURNS = re.compile(r"quat|rot|euler|rpy|orientation|axis_?angle|_aa")
"""Words of a rotation, before its x."""
SIX = re.compile(r"6d.*[0-5]$|[0-5].*6d$")
OFF_ONE = 0.05
"""How far the length of a quaternion or a column may be off 1."""


class FoundPose(NamedTuple):
    """A pose, and what is to be known of it."""

    pose: Pose
    reason: str


def find_poses(names: Sequence[str], values: Float[np.ndarray, "n d"]) -> list[FoundPose]:
    """Poses whose names say x, y, z and a rotation, and whose numbers are of one.

    Angles that are not radians, and quaternions that are not of length 1, are none.
    """
    lower = [name.lower() for name in names]
    ends = [match[1] if (match := LAST.search(name)) else "" for name in lower]
    found, start = [], 0
    while start < len(names):
        rotation = start + 3
        position = ends[start:rotation] == ["x", "y", "z"] and not TURNS.search(lower[start])
        kind = _rotation(lower[rotation:], ends[rotation:], values[:, rotation:]) if position else None
        if kind is None:
            start += 1
            continue
        pose = Pose(start, kind[0])
        found.append(FoundPose(pose, f"{names[start]} to {names[pose.end - 1]}: {kind[1]}"))
        start = pose.end
    return found


def _rotation(names: Sequence[str], ends: Sequence[str], values: np.ndarray) -> tuple[str, str] | None:
    """Representation of the rotation that a vector begins with, and how sure that is."""
    four, three = tuple(ends[:4]), tuple(ends[:3])
    if len(names) >= 6 and all(SIX.search(name) for name in names[:6]):
        unit = _is_one(values[:, :3]) and _is_one(values[:, 3:6])
        return ("6d", "a guess: columns of the matrix, one after the other; 6d_rows if they are rows") if unit else None
    for order in ("xyzw", "wxyz"):
        if four in (tuple(f"q{letter}" for letter in order), tuple(order)):
            return (f"quaternion_{order}", "by their names, and of length 1") if _is_one(values[:, :4]) else None
    if not values.shape[1] >= 3 or np.abs(values[:, :3]).max() > 2 * np.pi:  # degrees, or no angles
        return None
    if three == ("roll", "pitch", "yaw"):
        return "euler_xyz", "a guess: about fixed axes, roll first"
    vector = three in (("rx", "ry", "rz"), ("wx", "wy", "wz"))
    if not vector and not (three == ("x", "y", "z") and TURNS.search(names[0])):
        return None
    if re.search("euler|rpy", names[0]):
        return "euler_xyz", "a guess: about fixed axes, x first"
    if np.linalg.norm(values[:, :3], axis=1).max() > np.pi + OFF_ONE:
        return "euler_xyz", "a guess: longer than half a turn, so not the axis times the angle"
    sure = re.search(r"axis_?angle|_aa|rotvec", names[0])
    return "axis_angle", "by their names" if sure else "a guess: the axis times the angle; euler_xyz if they are angles"


def _is_one(vectors: np.ndarray) -> bool:
    return bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) < OFF_ONE).mean() > 0.99)
