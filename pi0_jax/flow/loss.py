"""Losses over chunks: means over the entries that a mask leaves."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def flow_loss(
    predicted: Float[Array, "*b ah ad"],
    target: Float[Array, "*b ah ad"],
    mask: Bool[Array, "*b ah ad"],
    count: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean squared error over the entries of the mask (equation 1 of the π0 paper, arXiv 2410.24164).

    The mean is taken over all those entries of the batch at once, so an example with few of them weighs accordingly
    less, and one with none weighs nothing. Under a sharded `jit` this is the mean of the global batch.

    Args:
        predicted: the network's output.
        target: of the same shape.
        mask: of `loss_mask`.
        count: what to divide by; None: the number of the mask's entries. That of a whole batch makes the losses of its
            microbatches add up to the batch's.

    Returns:
        A scalar, float32; 0 where the mask is empty.
    """
    # Masked before squaring: whatever padding holds, infinities too, reaches neither the value nor the gradient.
    error = jnp.where(mask, predicted.astype(jnp.float32) - target.astype(jnp.float32), 0.0)
    return jnp.sum(jnp.square(error)) / jnp.maximum(jnp.sum(mask) if count is None else count, 1)


def loss_mask(
    shape: tuple[int, ...],
    step_mask: Bool[Array, "*#b ah"] | None = None,
    dim_mask: Bool[Array, "*#b ad"] | None = None,
) -> Bool[Array, "..."]:
    """Entries of chunks that the loss counts.

    Args:
        shape: of the chunks, `[*b, ah, ad]`.
        step_mask: False for steps to leave out (after an episode's end); None counts all, as openpi does.
        dim_mask: False for dimensions to leave out (zero padding); None counts all, as openpi does and as the released
            weights were trained; LeRobot leaves padding out.
    """
    mask = jnp.ones(shape, bool)
    if step_mask is not None:
        mask &= step_mask[..., None]
    if dim_mask is not None:
        mask &= dim_mask[..., None, :]
    return mask
