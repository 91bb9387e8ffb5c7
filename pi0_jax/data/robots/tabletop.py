"""The simulated gantry of the tabletop: a ring that reaches for objects on a table and pushes them."""

from __future__ import annotations

from pi0_jax.data.robots import Planar, Robot

ROBOT = Robot(
    name="tabletop",
    cameras={"observation.images.top": "top", "observation.images.tool": "tool"},
    state=("tool_x", "tool_y", "tool_z", "command_x", "command_y", "command_z"),  # metres
    actions=("dx", "dy", "dz"),  # change of the commanded position, metres
    fps=5,
    image_size=(48, 48),
    changes=("dx", "dy", "dz"),
    planar=Planar(state=((0, 1), (3, 4)), actions=((0, 1),)),
)
