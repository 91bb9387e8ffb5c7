"""Distributions of the flow time in training. Convention (`path.py`): t = 1 is noise, t = 0 is data."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Key


@dataclasses.dataclass(frozen=True)
class Beta:
    """π0's times, 0.001 + 0.999 · Beta(alpha, 1), which favour noise (arXiv 2410.24164, appendix B)."""

    alpha: float = 1.5
    """Larger values train more at noisy times, where the instruction has to decide between ways to act: less noisy
    chunks give that away. 1 is uniform."""

    def sample(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times in [0, 1] of this shape."""
        # Beta(a, 1) has the distribution function x^a, as has a uniform draw to the power 1/a.
        return 0.001 + 0.999 * jax.random.uniform(key, shape) ** (1 / self.alpha)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Times uniform on [0, 1)."""

    def sample(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times in [0, 1) of this shape."""
        return jax.random.uniform(key, shape)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """Sigmoid of a standard normal, which favours the middle (Esser et al. 2024, arXiv 2403.03206)."""

    def sample(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times in (0, 1) of this shape."""
        return jax.nn.sigmoid(jax.random.normal(key, shape))


TimeDistribution = Beta | Uniform | LogitNormal
