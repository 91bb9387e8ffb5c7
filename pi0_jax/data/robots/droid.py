"""DROID: a Franka Panda with a Robotiq gripper on many tables (Khazatsky et al. 2024, arXiv 2403.12945)."""

from __future__ import annotations

from pi0_jax.data.robots import Robot

JOINTS = tuple(f"joint_{i}" for i in range(1, 8))

DROID = Robot(
    name="droid",
    cameras={"observation.images.exterior_1": "base_0_rgb", "observation.images.wrist": "left_wrist_0_rgb"},
    state=(*JOINTS, "gripper"),  # radians; 0 open to 1 closed
    actions=(*JOINTS, "gripper"),  # target positions in the same units
    fps=15,
    image_size=(180, 320),
    semantics=(*["relative"] * 7, "gripper"),
)
