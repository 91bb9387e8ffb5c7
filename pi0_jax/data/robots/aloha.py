"""ALOHA: two ViperX arms with parallel grippers (Zhao et al. 2023, arXiv 2304.13705).

The released π0 weights count some joints the other way round and measure grippers by the angle of their motor, in the
units of the robots they were trained on. The conversion, its constants in metres and radians, and which actions are
relative are openpi's; features are named as in LeRobot's ALOHA datasets with three cameras.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from pi0_jax.data.robots import Adapter, Clients, Grippers, Robot

Values = np.ndarray | np.floating
ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in ARM)
SIGNS = np.ones(14, np.float32)
SIGNS[[1, 2, 8, 9]] = -1  # shoulders and elbows
GRIPPERS = (6, 13)
OPEN_AND_CLOSED = {NAMES[i]: (1.0, 0.0) for i in GRIPPERS}

FINGER_CLOSED, FINGER_OPEN = 0.01844, 0.05800
"""Position of a finger, metres, where ALOHA's gripper state is 0 and 1."""
HORN, ROD = 0.022, 0.036
"""Lengths of the linkage between motor and finger, metres."""
ANGLE_CLOSED, ANGLE_OPEN = 0.5476, 1.6296
"""Angle of the motor, radians, that the weights call 0 and 1."""
COMMAND_CLOSED, COMMAND_OPEN = -0.6213, 1.4910
"""Angle that a command of 0 and 1 stands for."""


def angle_from_opening(opening: Values) -> Values:
    """Gripper state, 0 closed to 1 open, as the motor's angle in the weights' units."""
    finger = opening * (FINGER_OPEN - FINGER_CLOSED) + FINGER_CLOSED
    sine = (HORN**2 + finger**2 - ROD**2) / (2 * HORN * finger)
    return (np.arcsin(np.clip(sine, -1, 1)) - ANGLE_CLOSED) / (ANGLE_OPEN - ANGLE_CLOSED)


def opening_from_angle(angle: Values) -> Values:
    """The inverse of `angle_from_opening`, where the arcsine was not clipped."""
    sine = np.sin(angle * (ANGLE_OPEN - ANGLE_CLOSED) + ANGLE_CLOSED)
    finger = HORN * sine + np.sqrt(np.square(HORN * sine) + ROD**2 - HORN**2)
    return (finger - FINGER_CLOSED) / (FINGER_OPEN - FINGER_CLOSED)


def command_from_angle(angle: Values) -> Values:
    """A predicted gripper angle as ALOHA's command."""
    return (angle + ANGLE_CLOSED - COMMAND_CLOSED) / (COMMAND_OPEN - COMMAND_CLOSED)


def angle_from_command(command: Values) -> Values:
    """The inverse of `command_from_angle`."""
    return command * (COMMAND_OPEN - COMMAND_CLOSED) + COMMAND_CLOSED - ANGLE_CLOSED


def _convert(gripper: Callable[[Values], Values], values: np.ndarray) -> np.ndarray:
    out = np.asarray(values) * SIGNS
    for i in GRIPPERS:
        out[..., i] = gripper(out[..., i])
    return out


ROBOT = Robot(
    name="aloha",
    cameras={
        "observation.images.cam_high": "base_0_rgb",
        "observation.images.cam_left_wrist": "left_wrist_0_rgb",
        "observation.images.cam_right_wrist": "right_wrist_0_rgb",
    },
    state=NAMES,  # radians; grippers 0 closed to 1 open
    actions=NAMES,  # targets in the same units
    fps=50,
    image_size=(480, 640),
    semantics=(*["relative"] * 6, "gripper") * 2,
    grippers=Grippers(OPEN_AND_CLOSED, OPEN_AND_CLOSED),
    adapt=Adapter(
        state=functools.partial(_convert, angle_from_opening),
        state_inverse=functools.partial(_convert, opening_from_angle),
        actions=functools.partial(_convert, angle_from_command),
        actions_inverse=functools.partial(_convert, command_from_angle),
    ),
    clients=Clients(unused_cameras=("cam_low",), reset_pose=(0.0, -1.5, 1.5, 0.0, 0.0, 0.0)),
)
