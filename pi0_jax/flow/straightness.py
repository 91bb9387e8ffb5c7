"""How straight the paths of a flow are."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def straightness(points: Float[Array, "n *b ah ad"]) -> Float[Array, ""]:
    """Mean over paths and entries of ∫ |(x_1 − x_0) − dx/dt|² dt (rectified flow; Liu et al. 2023, arXiv 2209.03003).

    0 means that every path is a straight line run through at constant speed, so that one Euler step is exact.

    Args:
        points: at equally spaced times from one end to the other, as `integrate(..., path=True)` returns them.
    """
    steps = jnp.diff(points, axis=0) * (len(points) - 1)
    return jnp.mean(jnp.square(steps - (points[-1:] - points[:1])))
