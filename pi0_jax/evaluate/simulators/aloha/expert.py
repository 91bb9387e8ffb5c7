"""A scripted expert for ALOHA in simulation: fingertips follow waypoints, which inverse kinematics turns into joints.

It sees the true poses of the objects. The fingers of each arm keep one orientation, reach down for an object, close on
its faces along y, and lift it to the meeting point. The cube is then taken from the other side, by fingers turned by a
quarter that close on its faces along z; peg and socket are pushed together along x.
"""

# pyright: reportAttributeAccessIssue=false
# (the checker does not see MuJoCo's compiled functions)

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mujoco
import numpy as np

TIP = 0.14
"""Where a gripper holds things, metres along its x axis; the fingers end at 0.154."""
REST = np.array([0.0, -0.96, 1.16, 0.0, -0.3, 0.0])
"""Joints of an arm when an episode begins, radians."""
OPEN, CLOSED = 1.0, 0.0
PITCH = np.radians(75)
"""How far fingers that reach for the table point down, radians."""
MEETING = np.array([0.0, 0.5, 0.2])
"""Between the arms, whose bases are at x = ±0.469, y = 0.5; z is the height above the table, metres."""
HALF_LENGTH = 0.06
"""Of peg and socket, along x, metres; the peg meets the pin 0.02 behind the socket's mouth."""
DAMPING, TURN = 0.03, 0.3
"""Of the least squares; and the weight of a radian against a metre."""
ITERATIONS, FIRST_ITERATIONS = 3, 150
"""Per step, which follows on the last one; and from `REST`."""
MAX_SHIFT, MAX_ANGLE = 0.03, 0.2
"""Of one iteration, metres and radians: further away the Jacobian says little."""


class Waypoint(NamedTuple):
    """Where the point between the fingertips is at a step, and what the gripper is told from the last waypoint on."""

    step: int
    place: np.ndarray | Callable[[], np.ndarray]
    """Position, metres, `[3]`; a function is asked at every step, and may follow an object."""
    opening: float = OPEN

    def now(self) -> np.ndarray:
        return self.place() if callable(self.place) else self.place


class Arm:
    """One arm's kinematics; `pitch` is how far its fingers point down, `roll` how far they are turned about themselves,
    radians."""

    def __init__(self, model: mujoco.MjModel, side: str, pitch: float, roll: float = 0.0):
        self._model, self._scratch = model, mujoco.MjData(model)
        self._body = model.body(f"vx300s_{side}/gripper_link").id
        first = model.joint(f"vx300s_{side}/waist").id  # both arms come before what moves freely
        self._columns = slice(first, first + 6)
        self._low, self._high = model.jnt_range[self._columns].T
        toward = 1.0 if side == "left" else -1.0
        self.side = np.array([toward, 0.0, 0.0])  # from the arm's base to the middle
        self.axis = np.array([toward * np.cos(pitch), 0.0, -np.sin(pitch)])
        across = np.array([0.0, toward, 0.0])
        up = np.cross(self.axis, across)
        across, up = np.cos(roll) * across + np.sin(roll) * up, np.cos(roll) * up - np.sin(roll) * across
        self._goal = np.stack([self.axis, across, up], axis=1)

    def reset(self, place: np.ndarray) -> None:
        """Plans the way from the joints of an episode's beginning to a place."""
        self._joints = REST
        self._first = self.solve(place, FIRST_ITERATIONS)

    def approach(self, share: float) -> np.ndarray:
        """Joints `[6]` a share of the way to the place of `reset`, each moving straight to its target: fingers that
        followed a straight line there would pass where the arm is singular."""
        return REST + share * (self._first - REST)

    def tip(self, data: mujoco.MjData) -> np.ndarray:
        """Position of the point between the fingertips, metres, `[3]`."""
        return data.xpos[self._body] + TIP * self._rotation(data)[:, 0]

    def solve(self, place: np.ndarray, iterations: int = ITERATIONS) -> np.ndarray:
        """Joints `[6]` that bring the fingertips to a place, in the arm's orientation: damped least squares from the
        joints of the last call."""
        shift, turn = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        for _ in range(iterations):
            tip = self._solved_tip()
            mujoco.mj_jac(self._model, self._scratch, shift, turn, tip, self._body)
            errors = (
                _limited(place - tip, MAX_SHIFT),
                TURN * _limited(_rotation_vector(self._goal @ self._rotation(self._scratch).T), MAX_ANGLE),
            )
            jacobian = np.concatenate([shift[:, self._columns], TURN * turn[:, self._columns]])
            square = jacobian @ jacobian.T + DAMPING**2 * np.eye(6)
            step = jacobian.T @ np.linalg.solve(square, np.concatenate(errors))
            self._joints = np.clip(self._joints + step, self._low, self._high)
        return self._joints

    def _solved_tip(self) -> np.ndarray:
        """The fingertips by the last solution; all else that follows from it is in `_scratch` then."""
        self._scratch.qpos[self._columns] = self._joints
        mujoco.mj_kinematics(self._model, self._scratch)
        mujoco.mj_comPos(self._model, self._scratch)
        return self.tip(self._scratch)

    def _rotation(self, data: mujoco.MjData) -> np.ndarray:
        return data.xmat[self._body].reshape(3, 3)


class Expert:
    """The expert of one environment; `begin` after each reset, then `act` before each step.

    Args:
        task: transfer_cube or insertion.
        model, data: the environment's.
    """

    def __init__(self, task: str, model: mujoco.MjModel, data: mujoco.MjData):
        self._data = data
        cube = task == "transfer_cube"
        self._left = Arm(model, "left", 0.0, np.pi / 2) if cube else Arm(model, "left", PITCH)
        self._right = Arm(model, "right", PITCH)
        self._plan = _transfer if cube else _insertion

    def begin(self) -> None:
        """Plans for the objects as they lie now."""
        self._step = 0
        self._paths = self._plan(self._data, self._left, self._right)
        for arm, path in zip((self._left, self._right), self._paths, strict=True):
            arm.reset(path[0].now())

    def act(self) -> np.ndarray:
        """The joint targets of both arms and how far grippers open, `[14]`, for the next step."""
        self._step += 1
        action = []
        for arm, path in zip((self._left, self._right), self._paths, strict=True):
            at = next((i for i, point in enumerate(path) if point.step >= self._step), len(path) - 1)
            before, goal = (path[at - 1] if at else Waypoint(0, path[0].place)), path[at]
            share = _smooth((self._step - before.step) / (goal.step - before.step))
            place = (1 - share) * before.now() + share * goal.now()
            action += [*(arm.solve(place) if at else arm.approach(share)), goal.opening]
        return np.array(action, np.float32)


def _transfer(data: mujoco.MjData, left: Arm, right: Arm) -> tuple[list[Waypoint], list[Waypoint]]:
    """Paths of the left and the right arm that transfer the cube."""
    cube = data.body("box").xpos  # a view: where the cube is now
    return (
        [
            Waypoint(160, MEETING - 0.1 * left.axis),
            Waypoint(190, lambda: cube),
            Waypoint(300, lambda: cube, CLOSED),
        ],
        [*_grasp(right, cube, 0.02), Waypoint(160, MEETING, CLOSED)],
    )


def _insertion(data: mujoco.MjData, left: Arm, right: Arm) -> tuple[list[Waypoint], list[Waypoint]]:
    """Paths of the left and the right arm that put the peg into the socket."""

    def path(arm: Arm, name: str, height: float, end: float) -> list[Waypoint]:
        thing = data.body(name)

        def held(distance: float) -> np.ndarray:
            """Where the fingertips are when the thing's end, as it lies in the hand, is so far from the middle."""
            now = thing.xpos + thing.xmat.reshape(3, 3) @ (HALF_LENGTH * arm.side)
            return MEETING - distance * arm.side + arm.tip(data) - now

        return [
            *_grasp(arm, thing.xpos, height),
            Waypoint(180, MEETING - 0.1 * arm.side, CLOSED),
            Waypoint(200, lambda: held(0.04), CLOSED),
            Waypoint(250, lambda: held(end), CLOSED),
        ]

    return path(left, "socket", 0.022, -0.01), path(right, "peg", 0.01, -0.025)


def _grasp(arm: Arm, thing: np.ndarray, height: float) -> list[Waypoint]:
    """To a thing that lies on the table, its centre at a height, and around it."""
    resting = np.array([*thing[:2], height])
    above = resting - 0.08 * arm.axis
    return [
        Waypoint(45, above),
        Waypoint(50, above),
        Waypoint(75, resting),
        Waypoint(90, resting),
        Waypoint(110, resting, CLOSED),
    ]


def _smooth(share: float) -> float:
    """From 0 to 1 with no speed at the ends."""
    share = min(max(share, 0.0), 1.0)
    return share * share * (3 - 2 * share)


def _limited(vector: np.ndarray, most: float) -> np.ndarray:
    return vector * min(1.0, most / (np.linalg.norm(vector) + 1e-9))


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle, radians, `[3]`."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, rotation.ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
