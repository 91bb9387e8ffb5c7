"""The table, its objects and the gantry robot, as a MuJoCo model; and where objects lie at the start.

The robot is three slides (x, y, z) that carry a ring of posts. Lowered over an object the ring cages it, and dragging
the ring drags the object. Nothing of the gantry but the ring is drawn, so the arm never hides the table.
"""

from __future__ import annotations

import numpy as np

from pi0_jax.evaluate.simulators.tabletop.tasks import GOAL_RADIUS, OBJECTS

CONTROL_HZ = 5
PHYSICS_STEP = 0.005
"""Seconds a physics step takes; there are 40 in one control step."""
MAX_ACTION = 0.04
"""Largest change of the commanded position in one control step, metres per axis."""
COMMAND_LOW = np.array([-0.20, -0.20, 0.005])
COMMAND_HIGH = np.array([0.20, 0.20, 0.105])
"""Corners of the box that commanded positions are clipped to, metres."""
HALF_SPREAD = 0.17
"""Objects and circle start within this distance of the centre, along x and along y, metres."""
MIN_GAP = 0.14
"""Least distance between the centres of objects and circle at the start, metres."""
START_LOW, START_HIGH = np.array([-0.15, -0.15, 0.065]), np.array([0.15, 0.15, 0.105])
"""Corners of the box in which the ring starts, metres; higher than every object."""

NUM_POSTS, RING_RADIUS, POST_RADIUS, POST_LENGTH = 16, 0.065, 0.005, 0.05
REST_HEIGHT = {"red block": 0.024, "green puck": 0.015, "blue ball": 0.026}
"""Height of each object's centre when it rests on the table, metres."""

TOP_CAMERA_HEIGHT, TOP_CAMERA_REACH = 1.5, 0.25
TOOL_CAMERA_HEIGHT, TOOL_CAMERA_REACH = 0.5, 0.22
"""Cameras look straight down from `HEIGHT` (the tool's: above the ring) and see `REACH` to each side, metres."""


def _field_of_view(reach: float, height: float) -> float:
    return float(np.degrees(2 * np.arctan(reach / height)))


def _posts() -> str:
    """Capsules around the ring, standing on z = 0 of the tool's frame, and the rim that joins their tops."""
    angles = 2 * np.pi * (np.arange(NUM_POSTS + 1) + 0.5) / NUM_POSTS
    x, y = RING_RADIUS * np.cos(angles), RING_RADIUS * np.sin(angles)
    bottom, top = POST_RADIUS, POST_LENGTH - POST_RADIUS
    return "".join(
        f'<geom class="post" fromto="{x[i]} {y[i]} {bottom} {x[i]} {y[i]} {top}"/>'
        f'<geom class="rim" fromto="{x[i]} {y[i]} {top} {x[i + 1]} {y[i + 1]} {top}"/>'
        for i in range(NUM_POSTS)
    )


def build_xml(things: str | None = None) -> str:
    """A scene in MuJoCo's XML: the table, the cameras and the ring, and what is on the table, by default `objects_xml`.

    The ring's slides come first, then the joints of the things. The table is mid grey, so that images scaled to [-1, 1]
    have a mean near zero; it is larger than any straight-down camera sees. Friction cones are elliptic because pyramids
    would make pushing depend on the direction.
    """
    low, high = COMMAND_LOW, COMMAND_HIGH
    slides, motors = "", ""
    for i, name in enumerate("xyz"):
        axis = " ".join("1" if j == i else "0" for j in range(3))
        slides += f'<joint name="{name}" type="slide" axis="{axis}"/>'
        motors += (
            f'<position joint="{name}" kp="2000" dampratio="1" ctrlrange="{low[i]} {high[i]}" '
            f'forcerange="{"-20 20" if name == "z" else "-60 60"}"/>'
        )
    return f"""
<mujoco model="tabletop">
  <option timestep="{PHYSICS_STEP}" integrator="implicitfast" cone="elliptic"/>
  <default>
    <default class="object"><geom contype="1" conaffinity="3" mass="0.1" friction="0.5 0.01 0.003"/></default>
    <default class="drawing"><geom type="cylinder" contype="0" conaffinity="0"/></default>
    <default class="post">
      <geom type="capsule" size="{POST_RADIUS}" contype="2" conaffinity="0" mass="0" friction="0.2"
            rgba="0.08 0.08 0.10 1"/>
    </default>
    <default class="rim">
      <geom type="capsule" size="{POST_RADIUS}" contype="0" conaffinity="0" mass="0" group="1" rgba="0.08 0.08 0.10 1"/>
    </default>
  </default>
  <worldbody>
    <geom name="table" type="plane" size="0.5 0.5 0.01" friction="0.5"
          rgba="0.5 0.5 0.5 1"/>
    <camera name="top" pos="0 0 {TOP_CAMERA_HEIGHT}" fovy="{_field_of_view(TOP_CAMERA_REACH, TOP_CAMERA_HEIGHT)}"/>
    <camera name="view" pos="0 -0.75 0.62" xyaxes="1 0 0 0 0.64 0.77" fovy="30"/>
    <body name="tool" gravcomp="1">
      {slides}
      <inertial pos="0 0 {POST_LENGTH}" mass="1" diaginertia="0.01 0.01 0.01"/>
      {_posts()}
      <camera name="tool" pos="0 0 {TOOL_CAMERA_HEIGHT}"
              fovy="{_field_of_view(TOOL_CAMERA_REACH, TOOL_CAMERA_HEIGHT)}"/>
    </body>
    {objects_xml() if things is None else things}
  </worldbody>
  <actuator>{motors}</actuator>
</mujoco>"""


def goal_xml(radius: float = GOAL_RADIUS) -> str:
    """The yellow circle, a drawing that is put where the layout has it."""
    return f"""
    <body name="goal" mocap="true">
      <geom class="drawing" size="{radius} 0.0005" rgba="1 0.85 0 1"/>
    </body>"""


def objects_xml() -> str:
    """The circle and the objects of the six tasks, whose free joints are in the order of `OBJECTS`."""
    block, puck, ball = OBJECTS
    return f"""{goal_xml()}
    <body name="{block}">
      <freejoint/>
      <geom class="object" type="box" size="0.024 0.024 {REST_HEIGHT[block]}" rgba="0.95 0.05 0.05 1"/>
    </body>
    <body name="{puck}">
      <freejoint/>
      <geom class="object" type="cylinder" size="0.028 {REST_HEIGHT[puck]}" rgba="0.0 0.80 0.15 1"/>
    </body>
    <body name="{ball}">
      <freejoint/>
      <geom class="object" type="sphere" size="{REST_HEIGHT[ball]}" condim="6" rgba="0.05 0.15 1 1"/>
    </body>"""


def sample_positions(
    rng: np.random.Generator, count: int, half_spread: float = HALF_SPREAD, min_gap: float = MIN_GAP
) -> np.ndarray:
    """Uniform positions within `half_spread`, all at least `min_gap` apart. Metres, float64[count, 2]."""
    while True:
        points = rng.uniform(-half_spread, half_spread, size=(count, 2))
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(count, 1)]
        if gaps.min() >= min_gap:
            return points
