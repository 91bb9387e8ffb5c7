"""UR5 and UR5e: six joints and a parallel gripper, a camera beside the robot and one on the wrist.

State, relative joints and the slots of the cameras are those of openpi's UR5 example, and of the statistics `ur5e` of
the released weights. The names of features are ours: there is no published dataset that they could follow.
"""

from __future__ import annotations

from pi0_jax.data.robots import Robot

JOINTS = ("base", "shoulder", "elbow", "wrist_1", "wrist_2", "wrist_3")

ROBOT = Robot(
    name="ur5",
    cameras={"observation.images.base": "base_0_rgb", "observation.images.wrist": "left_wrist_0_rgb"},
    state=(*JOINTS, "gripper"),  # radians; gripper 0 to 1
    actions=(*JOINTS, "gripper"),  # target positions in the same units
    fps=None,
    image_size=(224, 224),
    semantics=(*["relative"] * 6, "gripper"),
)
