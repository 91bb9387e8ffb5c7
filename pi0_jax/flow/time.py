"""Distributions of the flow time in training. Convention (`path.py`): t = 1 is noise, t = 0 is data."""

from __future__ import annotations

from typing import Literal

import jax
from jaxtyping import Array, Float, PRNGKeyArray

TimeDistribution = Literal["beta", "uniform", "logit_normal"]


def sample_time(
    key: PRNGKeyArray, shape: tuple[int, ...], distribution: TimeDistribution = "beta", alpha: float = 1.5
) -> Float[Array, "*shape"]:
    """Draws flow times.

    Args:
        key: random key.
        shape: shape of the result.
        distribution: "beta" is π0's, 0.001 + 0.999 Beta(alpha, 1), which favours noisy times (arXiv 2410.24164,
            appendix B, in this package's direction of time); "uniform" on [0, 1); "logit_normal" the sigmoid of a
            standard normal, which favours the middle (Esser et al. 2024, arXiv 2403.03206).
        alpha: of the Beta distribution; π0's is 1.5, and larger ones favour noise more.

    Raises:
        ValueError: unknown distribution.
    """
    match distribution:
        case "beta":
            # Beta(a, 1) has the distribution function x^a, as has a uniform draw to the power 1/a.
            return 0.001 + 0.999 * jax.random.uniform(key, shape) ** (1 / alpha)
        case "uniform":
            return jax.random.uniform(key, shape)
        case "logit_normal":
            return jax.nn.sigmoid(jax.random.normal(key, shape))
    raise ValueError(f"unknown time distribution {distribution!r}; choose beta, uniform or logit_normal.")
