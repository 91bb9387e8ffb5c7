"""The Google robot of RT-1 (Brohan et al. 2022, arXiv 2212.06817), from Open X-Embodiment's `fractal20220817_data`.

Actions are changes of the end effector's pose, so nothing is relative; the gripper's is a change too: 1 closes, -1
opens, 0 leaves it as it is.
"""

from __future__ import annotations

from pi0_jax.data.robots import RldsNames, Robot

ROBOT = Robot(
    name="fractal",
    cameras={"observation.images.image": "base_0_rgb"},
    # metres in the robot's frame, a quaternion, and 0 open to 1 closed
    state=("x", "y", "z", "quaternion_x", "quaternion_y", "quaternion_z", "quaternion_w", "gripper_closed"),
    actions=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper_closing"),  # metres and radians a step
    fps=3,
    image_size=(256, 320),
    semantics=("absolute",) * 7,
    changes=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper_closing"),
    rlds=RldsNames(
        {
            "observation.images.image": "observation/image",
            "observation.state": "observation/base_pose_tool_reached + observation/gripper_closed",
            "action": "action/world_vector + action/rotation_delta + action/gripper_closedness_action",
        },
        fps=3,
        task="observation/natural_language_instruction",
    ),
)
