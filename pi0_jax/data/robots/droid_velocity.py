"""DROID with the actions of the released weights: joint velocities in its units of [-1, 1], and gripper position."""

from __future__ import annotations

import dataclasses

from pi0_jax.data.robots import droid

assert droid.ROBOT.rlds is not None
_ACTION = {"action": "action_dict/joint_velocity + action_dict/gripper_position"}
ROBOT = dataclasses.replace(
    droid.ROBOT,
    name="droid_velocity",
    semantics=(*["absolute"] * 7, "gripper"),
    changes=droid.JOINTS,
    velocities=droid.JOINTS,
    clients=droid.ROBOT.clients._replace(action_space="joint_velocity"),
    rlds=droid.ROBOT.rlds._replace(keys={**droid.ROBOT.rlds.keys, **_ACTION}),
)
