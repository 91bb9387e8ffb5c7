"""DROID: a Franka Panda with a Robotiq gripper on many tables (Khazatsky et al. 2024, arXiv 2403.12945).

Features are named as in LeRobot's port of the dataset (`lerobot/droid_1.0.1`). `droid` commands joint positions, as
that port does and as openpi trains from RLDS. `droid_velocity` commands joint velocities: the released weights
`pi0_droid` and `pi05_droid` do. Of the two cameras outside, one is read; openpi's training draws either.
"""

from __future__ import annotations

import dataclasses

from pi0_jax.data.robots import Robot

JOINTS = tuple(f"joint_{i}" for i in range(7))

DROID = Robot(
    name="droid",
    cameras={"observation.images.exterior_1_left": "base_0_rgb", "observation.images.wrist_left": "left_wrist_0_rgb"},
    state=(*JOINTS, "gripper"),  # radians; gripper 0 open to 1 closed
    actions=(*JOINTS, "gripper"),  # target positions in the same units
    fps=15,
    image_size=(180, 320),
    semantics=(*["relative"] * 7, "gripper"),
)
DROID_VELOCITY = dataclasses.replace(  # actions: velocities in DROID's units of [-1, 1]; the gripper's position
    DROID, name="droid_velocity", semantics=(*["absolute"] * 7, "gripper"), changes=JOINTS
)
