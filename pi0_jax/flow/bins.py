"""Discretised actions, the other baseline: uniform bins in each dimension, after RT-2 (arXiv 2307.15818) and OpenVLA.

Bins span [-1, 1], which in quantile-normalised units is the 1st to the 99th percentile of each dimension.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def to_bins(actions: Float[Array, "*b"], count: int) -> Int[Array, "*b"]:
    """Number of the bin, 0 … count − 1; what lies outside [-1, 1] goes to the outermost."""
    return jnp.clip(jnp.floor((actions + 1) / 2 * count), 0, count - 1).astype(jnp.int32)


def from_bins(bins: Int[Array, "*b"], count: int) -> Float[Array, "*b"]:
    """The middle of a bin, at most 1 / count from any action in it."""
    return (bins + 0.5) / count * 2 - 1


def bin_loss(
    logits: Float[Array, "*b ah ad k"],
    bins: Int[Array, "*b ah ad"],
    counted: Bool[Array, "*b ah ad"],
    total: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy over what counts, nats; 0 where nothing does. `total` divides the sum, where it is given."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), bins)
    return jnp.sum(jnp.where(counted, entropy, 0.0)) / jnp.maximum(jnp.sum(counted) if total is None else total, 1)
