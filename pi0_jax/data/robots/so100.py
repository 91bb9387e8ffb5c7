"""SO-100: five joints and a gripper, by Hugging Face and The Robot Studio, as LeRobot records them."""

from __future__ import annotations

from pi0_jax.data.robots import Grippers, Robot

NAMES = ("shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos", "gripper.pos")

ROBOT = Robot(
    name="so100",
    cameras={"observation.images.front": "base_0_rgb", "observation.images.wrist": "left_wrist_0_rgb"},
    state=NAMES,  # degrees, or LeRobot's -100 to 100; gripper 0 closed to 100 open
    actions=NAMES,  # target positions in the same units
    fps=30,
    image_size=(480, 640),
    semantics=(*["relative"] * 5, "gripper"),
    grippers=Grippers({"gripper.pos": (100.0, 0.0)}, {"gripper.pos": (100.0, 0.0)}),
)
