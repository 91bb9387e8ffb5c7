"""The flow-matching objective: squared error between predicted and true velocity."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def squared_error(predicted: Float[Array, "*b ah ad"], target: Float[Array, "*b ah ad"]) -> Float[Array, "*b ah"]:
    """Squared error of each step, averaged over all action dimensions; float32."""
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32)), axis=-1)


def flow_loss(
    predicted: Float[Array, "*b ah ad"],
    target: Float[Array, "*b ah ad"],
    step_mask: Bool[Array, "*#b ah"] | None = None,
    dim_mask: Bool[Array, "*#b ad"] | None = None,
    total: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean squared error over the steps and dimensions that count (equation 1 of the π0 paper, arXiv 2410.24164).

    The mean is taken over all counted entries of the batch at once, so an example with few counted steps weighs
    accordingly less, and one with none weighs nothing. Under a sharded `jit` this is the mean of the global batch.

    Args:
        predicted: the network's velocity.
        target: noise - actions.
        step_mask: False for steps to leave out (after an episode's end); None counts all, as openpi does.
        dim_mask: False for dimensions to leave out (zero padding); None counts all, as openpi does and as the released
            weights were trained; LeRobot leaves padding out.

    Returns:
        A scalar, float32; 0 where nothing counts.
    """
    counted = counted_entries(predicted.shape, step_mask, dim_mask)
    # Masked before squaring: whatever padding holds, infinities too, reaches neither the value nor the gradient.
    error = jnp.where(counted, predicted.astype(jnp.float32) - target.astype(jnp.float32), 0.0)
    return jnp.sum(jnp.square(error)) / jnp.maximum(jnp.sum(counted) if total is None else total, 1)


def counted_entries(
    shape: tuple[int, ...], step_mask: Bool[Array, "*#b ah"] | None, dim_mask: Bool[Array, "*#b ad"] | None
) -> Bool[Array, "*b ah ad"]:
    """Which entries of chunks of this shape count; arguments as those of `flow_loss`."""
    counted = jnp.ones(shape, bool)
    if step_mask is not None:
        counted &= step_mask[..., None]
    if dim_mask is not None:
        counted &= dim_mask[..., None, :]
    return counted
