"""Classifier-free guidance: a wrapper of a prediction, which knows no network."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0_jax.flow.path import Velocity


def classifier_free(both: Velocity, scale: float | Float[Array, ""]) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): v_uncond + scale · (v_cond − v_uncond).

    It is computed as v_cond + (scale − 1) · (v_cond − v_uncond), so that at scale 1 the result is v_cond exactly.

    Args:
        both: prediction for a batch of 2b: conditional, then unconditional. Any of those in `path.py`, since all are
            linear in one another.
        scale: 0 ignores the condition, 1 follows it, larger values exaggerate it; may be traced.

    Returns:
        The guided prediction for a batch of b.
    """

    def guided(x, time, *features):
        twice = jnp.concatenate([x, x]), jnp.concatenate([time, time]) if jnp.ndim(time) else time
        conditional, unconditional = jnp.split(both(*twice, *features), 2)
        return conditional + (scale - 1) * (conditional - unconditional)

    return guided
