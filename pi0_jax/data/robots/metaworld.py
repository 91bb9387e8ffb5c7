"""Meta-World: a simulated Sawyer arm and fifty tasks (Yu et al. 2019, arXiv 1910.10897).

Named as in LeRobot's dataset `lerobot/metaworld_mt50` and in its environment: one camera, `corner2`, turned upright.
Actions are changes of the hand's position, scaled to [-1, 1], so nothing is relative.
"""

from __future__ import annotations

from pi0_jax.data.robots import Grippers, Robot

ROBOT = Robot(
    name="metaworld",
    cameras={"observation.image": "base_0_rgb"},
    state=("x", "y", "z", "gripper"),  # metres; gripper 0 closed to 1 open
    actions=("dx", "dy", "dz", "gripper"),  # in [-1, 1]; gripper 1 closes
    fps=80,
    image_size=(480, 480),
    semantics=(*["absolute"] * 3, "gripper"),
    grippers=Grippers({"gripper": (1.0, 0.0)}, {"gripper": (-1.0, 1.0)}),
    changes=("dx", "dy", "dz"),
)
