"""Poses: a position and a rotation, in a robot's numbers and in the model's.

The model reads and predicts a rotation as the first two columns of its matrix, six numbers, of which any six that are
not parallel give a rotation (Zhou et al. 2019, arXiv 1812.07035). Each rotation has one such representation, and near
rotations have near ones. None of three or four numbers does that: rotation vectors jump at half a turn, which is where
a gripper that points down is, Euler angles wrap, and a quaternion and its negative are one rotation. So a pose takes
nine dimensions of the model, however many it takes of the robot.

A pose of an action may be relative to one of the state: with T = (position, rotation), T_state⁻¹ · T_action is the
target in the frame of the pose at which the chunk begins. Its three columns, position and two of the matrix, are those
of T_action turned back by the rotation of T_state.
"""

from __future__ import annotations

import re
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pi0_jax.errors import UserError

WIDTH = 9
"""Dimensions of a pose in the model: x, y, z, then the first and the second column of the rotation's matrix."""
WIDTHS = {"quaternion_xyzw": 4, "quaternion_wxyz": 4, "axis_angle": 3, "6d": 6, "6d_rows": 6}
"""Numbers of a rotation by its representation; Euler angles, `euler_...`, are three."""
COLUMNS = ("r11", "r21", "r31", "r12", "r22", "r32")
"""Names of a rotation's dimensions in the model: row and column of its matrix."""
SHORTEST = 1e-6
"""Length below which a quaternion, or a column, is no rotation."""

Values = Float[np.ndarray, "*b d"]
Matrix = Float[np.ndarray, "*b 3 3"]


class Pose(NamedTuple):
    """Dimensions of a robot's state or action that are a pose: x, y and z, and the numbers of a rotation after them."""

    start: int
    """Index of x."""
    rotation: str
    """quaternion_xyzw or quaternion_wxyz, by the order of the numbers. axis_angle: the axis times the angle in radians.
    6d: the first two columns of the matrix, one after the other; 6d_rows: its first two rows. euler_xyz: angles in
    radians about fixed axes, the first of them first, as roll, pitch and yaw are; euler_ZYX and the like, in capitals:
    about the axes of the body, as scipy names them."""

    @property
    def end(self) -> int:
        """Index after the last number."""
        return self.start + 3 + WIDTHS.get(self.rotation, 3)


class Poses(NamedTuple):
    """Poses of a robot. The first of the actions is relative to the first of the state, the second to the second."""

    state: tuple[Pose, ...] = ()
    actions: tuple[Pose, ...] = ()


def check_poses(poses: tuple[Pose, ...], names: tuple[str, ...], owner: str) -> None:
    """Refuses poses of unknown representation, beyond the dimensions `names`, or in one another's.

    Raises:
        UserError: there is such a pose; `owner` says of whom.
    """
    taken: set[int] = set()
    for pose in poses:
        if pose.rotation not in WIDTHS and not re.fullmatch(r"euler_([xyz]{3}|[XYZ]{3})", pose.rotation):
            raise UserError(
                f"{owner} has a pose with rotation {pose.rotation!r}; expected one of {', '.join(WIDTHS)}, euler_xyz "
                "or Euler angles in another order."
            )
        dims = set(range(pose.start, pose.end))
        if pose.start < 0 or pose.end > len(names) or dims & taken:
            raise UserError(
                f"{owner} has a pose of {pose.rotation} in dimensions {pose.start} to {pose.end - 1}, which do not "
                f"exist or belong to another pose; there are {len(names)}: {', '.join(names)}."
            )
        taken |= dims


def model_index(index: int, poses: tuple[Pose, ...]) -> int:
    """Dimension of the model for one of the robot's that is the first of a pose, or in none."""
    return index + sum(WIDTH + pose.start - pose.end for pose in poses if pose.start < index)


def model_slice(pose: Pose, poses: tuple[Pose, ...]) -> slice:
    """Dimensions of the model that one of a vector's poses takes."""
    start = model_index(pose.start, poses)
    return slice(start, start + WIDTH)


def model_names(names: tuple[str, ...], poses: tuple[Pose, ...]) -> tuple[str, ...]:
    """Names of the model's dimensions, by those of the robot's; a rotation's have the prefix of the pose's x."""
    found, place = [], 0
    for pose in sorted(poses):
        prefix = names[pose.start].removesuffix("x")
        found += [*names[place : pose.start + 3], *(prefix + column for column in COLUMNS)]
        place = pose.end
    return (*found, *names[place:])


def to_model(values: Float[np.ndarray, "*b d"], poses: tuple[Pose, ...]) -> Float[np.ndarray, "*b m"]:
    """The robot's numbers with the rotations of `poses` as the model reads them.

    Raises:
        UserError: a quaternion of length 0, or parallel columns, which are no rotation.
    """
    parts, place = [], 0
    for pose in sorted(poses):
        matrix = _read(values[..., pose.start + 3 : pose.end], pose.rotation)
        parts += [values[..., place : pose.start + 3], _columns(matrix)]
        place = pose.end
    return np.concatenate([*parts, values[..., place:]], axis=-1)


def from_model(values: Float[np.ndarray, "*b m"], poses: tuple[Pose, ...]) -> Float[np.ndarray, "*b d"]:
    """The inverse of `to_model`: any six numbers that are no rotation yet are brought to one by Gram and Schmidt.

    Quaternions have w ≥ 0, angles are in [-π, π].

    Raises:
        UserError: columns of length 0, or parallel ones, which are no rotation.
    """
    parts, place = [], 0
    for pose in sorted(poses):
        own = model_slice(pose, poses)
        matrix = _orthonormal(values[..., own.start + 3 : own.stop])
        parts += [values[..., place : own.start + 3], _write(matrix, pose.rotation)]
        place = own.stop
    return np.concatenate([*parts, values[..., place:]], axis=-1)


def steady_signs(
    chunk: Float[np.ndarray, "*b ah d"], poses: Poses, state: Float[np.ndarray, "... s"] | None = None
) -> Float[np.ndarray, "*b ah d"]:
    """Actions of the robot whose quaternions do not change sign from one step to the next.

    The first step's is that of the state's quaternion, if `state`, which is broadcast, has it in the same order.
    """
    chunk = np.array(chunk)
    for number, pose in enumerate(poses.actions):
        if pose.rotation.startswith("quaternion"):
            own = chunk[..., pose.start + 3 : pose.end]
            first = own[..., :1, :]
            if (
                state is not None
                and (origin := poses.state[number : number + 1])
                and origin[0].rotation == pose.rotation
            ):
                first = np.broadcast_to(state[..., None, origin[0].start + 3 : origin[0].end], first.shape)
            way = np.concatenate([first, own], axis=-2)
            turned = (way[..., 1:, :] * way[..., :-1, :]).sum(-1) < 0
            own *= np.where(np.cumsum(turned, axis=-1) % 2, -1.0, 1.0)[..., None]
    return chunk


def relative(poses: Float[np.ndarray, "... 9"], anchor: Float[np.ndarray, "... 9"]) -> Float[np.ndarray, "... 9"]:
    """T_anchor⁻¹ · T of poses in the model's numbers; `anchor` is broadcast."""
    rows = _rows(poses)
    rows[..., 0, :] -= anchor[..., :3]
    return (rows @ _orthonormal(anchor[..., 3:])).reshape(poses.shape)


def absolute(poses: Float[np.ndarray, "... 9"], anchor: Float[np.ndarray, "... 9"]) -> Float[np.ndarray, "... 9"]:
    """T_anchor · T of poses in the model's numbers: the inverse of `relative`."""
    rows = _rows(poses) @ np.swapaxes(_orthonormal(anchor[..., 3:]), -1, -2)
    rows[..., 0, :] += anchor[..., :3]
    return rows.reshape(poses.shape)


def between(
    before: Float[np.ndarray, "n 9"], after: Float[np.ndarray, "n 9"], weight: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n 9"]:
    """Poses in the model's numbers on the way from one to another: a straight line, and an even turn the short way.

    `weight` is the share of the way, 0 to 1.
    """
    from scipy.spatial.transform import Rotation

    first, last = _orthonormal(before[:, 3:]), _orthonormal(after[:, 3:])
    turn = Rotation.from_matrix(np.swapaxes(first, -1, -2) @ last).as_rotvec()
    matrix = first @ Rotation.from_rotvec(weight[:, None] * turn).as_matrix()
    position = before[:, :3] + weight[:, None] * (after[:, :3] - before[:, :3])
    return np.concatenate([position, _columns(matrix)], axis=-1)


def _rows(poses: Float[np.ndarray, "... 9"]) -> Float[np.ndarray, "... 3 3"]:
    """Position and the two columns as rows: vectors that a rotation turns alike."""
    return np.array(poses, np.float64).reshape(*poses.shape[:-1], 3, 3)


def no_rotation(pose: Pose) -> Float[np.ndarray, "n"]:
    """The rotation that turns nothing, in the numbers of a pose."""
    return _write(np.eye(3), pose.rotation)


def _columns(matrix: Matrix) -> Float[np.ndarray, "*b 6"]:
    """The first two columns, one after the other."""
    return np.swapaxes(matrix, -1, -2).reshape(*matrix.shape[:-2], 9)[..., :6]


def _orthonormal(columns: Float[np.ndarray, "*b 6"]) -> Matrix:
    """The matrix of two columns, the second of which is brought to a right angle with the first."""
    first, second = np.asarray(columns[..., :3], np.float64), np.asarray(columns[..., 3:], np.float64)
    first = _unit(first, "6d")
    second = _unit(second - (first * second).sum(-1, keepdims=True) * first, "6d")
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _unit(values: Values, rotation: str) -> Values:
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    if (bad := int((lengths < SHORTEST).sum())) > 0:
        raise UserError(
            f"{bad} of {lengths.size} rotations given as {rotation} have length 0 or parallel columns, which is no "
            "rotation: is the sensor off, or the dataset filled up with zeros? Leave such a pose, or its episodes, out."
        )
    return values / lengths


def _read(values: Values, rotation: str) -> Matrix:
    """Matrices of rotations in a robot's numbers."""
    if rotation == "6d":
        return _orthonormal(values)
    if rotation == "6d_rows":
        return np.swapaxes(_orthonormal(values), -1, -2)
    from scipy.spatial.transform import Rotation  # takes a while, and few robots need it

    batch, flat = values.shape[:-1], np.asarray(values, np.float64).reshape(-1, values.shape[-1])
    if rotation == "axis_angle":
        turns = Rotation.from_rotvec(flat)
    elif rotation.startswith("euler_"):
        turns = Rotation.from_euler(rotation.removeprefix("euler_"), flat)
    else:
        flat = _unit(flat, rotation)
        turns = Rotation.from_quat(flat if rotation.endswith("xyzw") else np.roll(flat, -1, axis=-1))
    return turns.as_matrix().reshape(*batch, 3, 3)


def _write(matrix: Matrix, rotation: str) -> Values:
    """Rotations in a robot's numbers, of their matrices."""
    if rotation == "6d":
        return _columns(matrix)
    if rotation == "6d_rows":
        return _columns(np.swapaxes(matrix, -1, -2))
    from scipy.spatial.transform import Rotation

    turns = Rotation.from_matrix(matrix.reshape(-1, 3, 3))
    if rotation == "axis_angle":
        flat = turns.as_rotvec()
    elif rotation.startswith("euler_"):
        with warnings.catch_warnings():  # where two axes coincide, one of many equal answers is as good as another
            warnings.simplefilter("ignore", UserWarning)
            flat = turns.as_euler(rotation.removeprefix("euler_"))
    else:
        flat = turns.as_quat(canonical=True)
        flat = flat if rotation.endswith("xyzw") else np.roll(flat, 1, axis=-1)
    return flat.reshape(*matrix.shape[:-2], flat.shape[-1])
