"""Wrappers of a velocity that steer it. They know no network, and whatever takes a velocity takes a guided one."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0_jax.flow.path import Velocity


def classifier_free(both: Velocity, scale: float | Float[Array, ""]) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): v_uncond + scale · (v_cond − v_uncond).

    It is computed as v_cond + (scale − 1) · (v_cond − v_uncond), so that at scale 1 the result is v_cond exactly.

    Args:
        both: velocity of a batch twice as large: its first half is told the condition, its second half is not.
        scale: 0 ignores the condition, 1 follows it, larger values exaggerate it; may be traced.

    Returns:
        The velocity of the batch itself.
    """

    def guided(x, time):
        conditional, unconditional = jnp.split(both(jnp.concatenate([x, x]), time), 2)
        return conditional + (scale - 1) * (conditional - unconditional)

    return guided
