"""RMSNorm, plain and adaptive; and how parameters get their logical axis names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-6


def named(init: Callable[..., Any], axes: tuple[str | None, ...]) -> Callable[..., Any]:
    """An initialiser whose parameter carries logical axis names, which `training.sharding` places on the mesh."""
    return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) with Gemma's zero-centred scale: x / rms(x) · (1 + scale).

    Adaptive, as in π0.5: a condition (the embedded flow time) gives scale, shift and a gate for the residual branch,
    all zero at initialisation, after adaLN-Zero (Peebles and Xie 2022, arXiv 2212.09748).
    """

    adaptive: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], condition: Float[Array, "b g e"] | None = None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"] | None]:
        """Normalises the last axis, statistics in float32.

        Args:
            x: tokens.
            condition: for the adaptive norm only; g conditions, each for t / g successive tokens (1: all of them).

        Returns:
            The normalised tokens, and the gate of the residual branch (None unless adaptive).
        """
        width = x.shape[-1]
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPSILON)
        if not self.adaptive:
            init = named(nn.initializers.zeros_init(), ("embed",))
            scale = self.param("scale", init, (width,), jnp.float32)
            return (normed * (1 + scale)).astype(x.dtype), None
        modulation = nn.Dense(
            3 * width,
            dtype=x.dtype,
            kernel_init=named(nn.initializers.zeros_init(), ("embed", "modulation")),
            bias_init=named(nn.initializers.zeros_init(), ("modulation",)),
            name="modulation",
        )(condition)
        if modulation.shape[1] > 1:
            modulation = jnp.repeat(modulation, x.shape[1] // modulation.shape[1], axis=1)
        scale, shift, gate = jnp.split(modulation, 3, axis=-1)
        return (normed * (1 + scale) + shift).astype(x.dtype), gate
