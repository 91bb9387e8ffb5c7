"""The straight-line path of conditional flow matching.

The one statement of the time convention: **t = 1 is noise, t = 0 is data**, as the released π0 weights have it. The
papers write tau = 1 - t. Everything in this package follows t.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float

Chunk = Float[Array, "*b ah ad"]
"""Action chunk, normalised units."""

Velocity = Callable[[Array, Array], Array]
"""dx/dt at the point x and the time t; x and the result have one shape, t is a scalar or broadcasts over chunks."""


def interpolate(actions: Chunk, noise: Chunk, time: Float[Array, "*b"] | Float[Array, "*b ah"]) -> tuple[Chunk, Chunk]:
    """The point x_t on the line from `actions` to `noise`, and its velocity dx/dt (arXiv 2210.02747).

    Args:
        actions: data, the end at t = 0.
        noise: standard normal, the end at t = 1.
        time: in [0, 1], one number a chunk or one an action.

    Returns:
        `t * noise + (1 - t) * actions` and `noise - actions`.
    """
    t = time[..., None] if time.ndim == actions.ndim - 1 else time[..., None, None]
    return t * noise + (1 - t) * actions, noise - actions
