"""Gaussian paths from data to noise, and the four names for what a network says of one.

The one statement of the time convention: **t = 1 is noise, t = 0 is data**, as the released π0 weights have it. The
papers write tau = 1 - t. Everything in this package follows t.

A path is x_t = alpha(t) · actions + sigma(t) · noise. Each prediction is a linear combination of actions and noise:

    velocity   alpha' · actions + sigma' · noise   dx/dt; on the straight path noise - actions
    noise      noise
    data       actions
    v          alpha · noise - sigma · actions

so with x_t itself any of them gives actions and noise by a 2 x 2 solve, and with these every other one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Predicts = Literal["velocity", "noise", "data", "v"]

Chunk = Float[Array, "*b ah ad"]
"""Action chunk, normalised units."""
Time = Float[Array, "*t"] | float
"""Flow time: a scalar, one per chunk `[*b]`, or one per action `[*b ah]`."""
Velocity = Callable[..., Chunk]
"""dx/dt at the point x and the time t, `velocity(x, t)`; x and the result have one shape."""

MIN_DETERMINANT = 1e-3
"""Bound of the 2 x 2 solve, where noise says nothing of the data, or data nothing of the noise."""


class Coefficients(NamedTuple):
    """Path at one time, broadcastable to chunks."""

    alpha: Float[Array, "*t"]
    sigma: Float[Array, "*t"]
    d_alpha: Float[Array, "*t"]
    d_sigma: Float[Array, "*t"]


class Estimate(NamedTuple):
    """Data and noise that a prediction at a point means."""

    data: Chunk
    noise: Chunk


@dataclasses.dataclass(frozen=True)
class Straight:
    """Straight path of flow matching, x_t = (1 - t) · actions + t · noise."""

    def at(self, time: Time) -> Coefficients:
        """The path's coefficients at a time."""
        time = jnp.asarray(time, jnp.float32)
        one = jnp.ones_like(time)
        return Coefficients(1 - time, time, -one, one)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Cosine path of diffusion, alpha² + sigma² = 1 (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17)."""

    offset: float = 0.008
    min_alpha: float = 1e-3
    """Smallest alpha: below it data cannot be told from noise, and the path stops."""

    def at(self, time: Time) -> Coefficients:
        """The path's coefficients at a time."""
        time = jnp.asarray(time, jnp.float32)
        rate = jnp.pi / 2 / (1 + self.offset)
        start = rate * self.offset
        scale = jnp.cos(start)
        angle = (time + self.offset) / (1 + self.offset) * jnp.pi / 2
        alpha = jnp.clip(jnp.cos(angle) / scale, self.min_alpha, 1.0)
        # sigma² = 1 - alpha², of which float32 leaves nothing near t = 0; as a product of sines it is exact there.
        sines = jnp.sin(rate * time) * jnp.sin(rate * time + 2 * start) / jnp.square(scale)
        sigma = jnp.sqrt(jnp.where(alpha < 0.7, 1 - jnp.square(alpha), jnp.maximum(sines, 0.0)))
        d_alpha = -rate * jnp.sin(angle) / scale
        # sigma' = -alpha alpha' / sigma, whose limit at sigma = 0 (without an offset) is the rate.
        steep = jnp.where(sigma > 1e-3, -d_alpha / jnp.maximum(sigma, 1e-3), rate)
        return Coefficients(alpha, sigma, d_alpha, alpha * steep)


Path = Straight | Cosine


def along(time: Float[Array, "*t"], x: Chunk) -> Float[Array, "*u"]:
    """The time in the shape that broadcasts over chunks: from a scalar, one per chunk, or one per action."""
    if time.ndim == 0:
        return time
    return time[..., None] if time.ndim == x.ndim - 1 else time[..., None, None]


def interpolate(
    path: Path, actions: Chunk, noise: Chunk, time: Time, predicts: Predicts = "velocity"
) -> tuple[Chunk, Chunk]:
    """The point x_t between `actions` and `noise`, and what the network shall predict there (arXiv 2210.02747).

    Args:
        path: the Gaussian path.
        actions: data, the end at t = 0.
        noise: standard normal, the end at t = 1.
        time: in [0, 1], one per chunk or one per action.
        predicts: what the network's output means.
    """
    c = path.at(along(jnp.asarray(time), actions))
    p, q = _row(c, predicts)
    return c.sigma * noise + c.alpha * actions, q * noise + p * actions


def estimate(path: Path, predicted: Chunk, x: Chunk, time: Time, predicts: Predicts) -> Estimate:
    """Data and noise that a prediction at x means: the solution of x = alpha a + sigma ε, predicted = p a + q ε."""
    c = path.at(along(jnp.asarray(time), x))
    p, q = _row(c, predicts)
    determinant = c.alpha * q - c.sigma * p
    # That of data is -sigma, and negative also where sigma is 0; the others are positive.
    sign = -1.0 if predicts == "data" else 1.0
    safe = sign * jnp.maximum(sign * determinant, MIN_DETERMINANT)
    data = predicted if predicts == "data" else (q * x - c.sigma * predicted) / safe
    noise = predicted if predicts == "noise" else (c.alpha * predicted - p * x) / safe
    return Estimate(data, noise)


def to_velocity(path: Path, predicted: Chunk, x: Chunk, time: Time, predicts: Predicts) -> Chunk:
    """dx/dt that a prediction at x means."""
    if predicts == "velocity":
        return predicted
    data, noise = estimate(path, predicted, x, time, predicts)
    c = path.at(along(jnp.asarray(time), x))
    return c.d_alpha * data + c.d_sigma * noise


def _row(c: Coefficients, predicts: Predicts) -> tuple:
    """Coefficients of actions and noise in a prediction."""
    one = jnp.ones_like(c.alpha)
    rows = {
        "velocity": (c.d_alpha, c.d_sigma),
        "noise": (0 * one, one),
        "data": (one, 0 * one),
        "v": (-c.sigma, c.alpha),
    }
    return rows[predicts]
