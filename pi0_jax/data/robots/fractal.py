"""The Google robot of RT-1 (Brohan et al. 2022, arXiv 2212.06817), with its RLDS preset `fractal`.

Actions are changes of the end effector's pose, so nothing is relative; the gripper's is a change too: 1 closes, -1
opens, 0 leaves it as it is.
"""

from __future__ import annotations

from pi0_jax.data.robots import Robot

FRACTAL = Robot(
    name="fractal",
    cameras={"observation.images.image": "base_0_rgb"},
    # metres in the robot's frame, a quaternion, and 0 open to 1 closed
    state=("x", "y", "z", "quaternion_x", "quaternion_y", "quaternion_z", "quaternion_w", "gripper_closed"),
    actions=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper_closing"),  # metres and radians a step
    fps=3,
    image_size=(256, 320),
    semantics=("absolute",) * 7,
    changes=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper_closing"),
)
