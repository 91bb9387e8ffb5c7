"""PushT: a disc that pushes a T on a board of 512 × 512 pixels (Chi et al. 2023, arXiv 2303.04137).

Named as in LeRobot's dataset `lerobot/pusht`. Actions are positions that the disc goes to.
"""

from __future__ import annotations

from pi0_jax.data.robots import Robot

ROBOT = Robot(
    name="pusht",
    cameras={"observation.image": "base_0_rgb"},
    state=("x", "y"),  # pixels
    actions=("x", "y"),  # pixels
    fps=10,
    image_size=(96, 96),
    semantics=("relative", "relative"),
)
