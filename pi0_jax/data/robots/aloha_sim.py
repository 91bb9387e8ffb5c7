"""ALOHA in simulation (gym-aloha): the same two arms, one camera, and units that need no conversion."""

from __future__ import annotations

import dataclasses

from pi0_jax.data.robots import aloha

ROBOT = dataclasses.replace(
    aloha.ROBOT,
    name="aloha_sim",
    cameras={"observation.images.top": "base_0_rgb"},
    semantics=(*["absolute"] * 6, "gripper") * 2,
    adapt=None,
)
