"""DROID: a Franka Panda with a Robotiq gripper on many tables (Khazatsky et al. 2024, arXiv 2403.12945).

Features are named as in LeRobot's port of the dataset (`lerobot/droid_1.0.1`). Actions are joint positions, as in that
port and as openpi trains from RLDS; `droid_velocity` is for the released weights `pi0_droid` and `pi05_droid`. Of the
two cameras outside, one is read; openpi's training draws either. Failed attempts are among the published RLDS records
too, and only their path tells.
"""

from __future__ import annotations

from pi0_jax.data.robots import Clients, Grippers, RldsNames, Robot

JOINTS = tuple(f"joint_{i}" for i in range(7))

ROBOT = Robot(
    name="droid",
    cameras={"observation.images.exterior_1_left": "base_0_rgb", "observation.images.wrist_left": "left_wrist_0_rgb"},
    state=(*JOINTS, "gripper"),  # radians; gripper 0 open to 1 closed
    actions=(*JOINTS, "gripper"),  # target positions in the same units
    fps=15,
    image_size=(180, 320),
    semantics=(*["relative"] * 7, "gripper"),
    grippers=Grippers({"gripper": (0.0, 1.0)}, {"gripper": (0.0, 1.0)}),
    clients=Clients(
        {
            "exterior_image_1_left": "base_0_rgb",
            "exterior_image_0_left": "base_0_rgb",  # RoboArena counts from 0
            "wrist_image_left": "left_wrist_0_rgb",
        },
        action_space="joint_position",
    ),
    rlds=RldsNames(
        {
            "observation.images.exterior_1_left": "observation/exterior_image_1_left",
            "observation.images.exterior_2_left": "observation/exterior_image_2_left",
            "observation.images.wrist_left": "observation/wrist_image_left",
            "observation.state": "observation/joint_position + observation/gripper_position",
            "action": "action_dict/joint_position + action_dict/gripper_position",
        },
        fps=15,
        only="success",
    ),
)
