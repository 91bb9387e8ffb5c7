"""WidowX 250 as in BridgeData V2 (Walke et al. 2023, arXiv 2308.12952), from its RLDS release.

The layout is that of the authors' own release, `bridge_dataset`, which Octo and OpenVLA train on; the older copy in
Open X-Embodiment, `bridge`, has other keys. `image_0` is over the shoulder. Actions are changes of the end effector's
pose, so nothing is relative.
"""

from __future__ import annotations

from pi0_jax.data.robots import Grippers, RldsNames, Robot

ROBOT = Robot(
    name="bridge",
    cameras={"observation.images.image_0": "base_0_rgb"},
    state=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),  # metres, radians; gripper 0 closed to 1 open
    actions=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),  # metres and radians a step; gripper 1 opens
    fps=5,
    image_size=(256, 256),
    semantics=(*["absolute"] * 6, "gripper"),
    grippers=Grippers({"gripper": (1.0, 0.0)}, {"gripper": (1.0, 0.0)}),
    changes=("dx", "dy", "dz", "droll", "dpitch", "dyaw"),
    rlds=RldsNames(
        {
            "observation.images.image_0": "observation/image_0",
            "observation.state": "observation/state",
            "action": "action",
        },
        fps=5,
    ),
)
