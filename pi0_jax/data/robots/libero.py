"""LIBERO: a simulated Panda under operational-space control (Liu et al. 2023, arXiv 2306.03310).

Cameras are named as LeRobot's LIBERO datasets and environment name them; openpi's dataset calls the features `image`,
`wrist_image`, `state` and `actions`, which a dataset's `keys` can say. Actions are changes of the pose already, in the
controller's units, so nothing is relative.
"""

from __future__ import annotations

from pi0_jax.data.robots import Clients, Grippers, Robot

ROBOT = Robot(
    name="libero",
    cameras={"observation.images.image": "base_0_rgb", "observation.images.image2": "left_wrist_0_rgb"},
    state=("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),  # metres, rad
    actions=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),  # controller units in [-1, 1]; gripper 1 closes
    fps=None,  # openpi's conversion says 10; the simulator runs at 20
    image_size=(256, 256),
    semantics=(*["absolute"] * 6, "gripper"),
    grippers=Grippers(actions={"gripper": (-1.0, 1.0)}),
    changes=("dx", "dy", "dz", "droll", "dpitch", "dyaw"),
    clients=Clients(
        {"wrist_image": "left_wrist_0_rgb"},
        action_spec={"position": "POSITION_DELTA", "rotation": "ROTATION_AA", "gripper": "GRIPPER_CLOSE_POS"},
    ),
)
