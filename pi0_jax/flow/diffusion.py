"""Denoising diffusion, the baseline that flow matching is measured against.

Same direction of time as the flow: t = 1 is noise, t = 0 is data. The point is x_t = alpha · actions + sigma · noise
with alpha² + sigma² = 1; the network predicts the noise ("epsilon") or v = alpha · noise − sigma · actions.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pi0_jax.flow.path import Chunk, Velocity

Prediction = Literal["epsilon", "v"]
OFFSET = 0.008
SMALLEST_ALPHA = 1e-3
"""Where alpha is smaller, the data cannot be told from the noise any more; the schedule stops there."""


def cosine_schedule(time: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """alpha and sigma of the cosine schedule (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17)."""
    alpha = jnp.cos((time + OFFSET) / (1 + OFFSET) * jnp.pi / 2) / jnp.cos(OFFSET / (1 + OFFSET) * jnp.pi / 2)
    alpha = jnp.clip(alpha, SMALLEST_ALPHA, 1.0)
    return alpha, jnp.sqrt(1 - jnp.square(alpha))


def diffuse(actions: Chunk, noise: Chunk, time: Float[Array, "*b"], prediction: Prediction) -> tuple[Chunk, Chunk]:
    """The noisy chunk at a time, and what the network shall predict there.

    Args:
        actions: data.
        noise: standard normal.
        time: in [0, 1], one number a chunk.
        prediction: "epsilon" (Ho et al. 2020, arXiv 2006.11239) or "v" (Salimans and Ho 2022, arXiv 2202.00512).
    """
    alpha, sigma = (a[..., None, None] for a in cosine_schedule(time))
    return alpha * actions + sigma * noise, noise if prediction == "epsilon" else alpha * noise - sigma * actions


def clean(predicted: Chunk, x: Chunk, time: Float[Array, ""], prediction: Prediction, clip: float) -> Chunk:
    """The data that a prediction at x means, cut to [-clip, clip] as is usual: near t = 1 epsilon says little of it."""
    alpha, sigma = cosine_schedule(time)
    actions = (x - sigma * predicted) / alpha if prediction == "epsilon" else alpha * x - sigma * predicted
    return jnp.clip(actions, -clip, clip)


def denoise(
    predict: Velocity,
    noise: Chunk,
    num_steps: int,
    prediction: Prediction,
    *,
    keys: PRNGKeyArray | None = None,
    clip: float = 3.0,
    path: bool = False,
):
    """Carries noise from t = 1 to t = 0 in equal steps by DDIM (Song et al. 2021, arXiv 2010.02502, equation 12).

    Args:
        predict: what the network says at a point and a scalar time; evaluated once a step.
        noise: the point at t = 1.
        num_steps: number of steps.
        prediction: what `predict` returns.
        keys: one a chunk, for noise that each step adds: eta = 1, which is DDPM's ancestral sampling on this grid.
            None: eta = 0, deterministic.
        clip: largest absolute value of an action, normalised units.
        path: also return every point on the way.

    Returns:
        The point at t = 0; with `path`, that and the `[num_steps + 1, *b, ah, ad]` points from t = 1 to t = 0.

    Raises:
        ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; denoising needs at least 1 step.")
    times = 1 - jnp.arange(num_steps + 1) / num_steps

    def step(x, i):
        time, following = times[i], times[i + 1]
        actions = clean(predict(x, time), x, time, prediction, clip)
        (alpha, sigma), (alpha_next, sigma_next) = cosine_schedule(time), cosine_schedule(following)
        epsilon = (x - alpha * actions) / sigma
        if keys is None:
            x = alpha_next * actions + sigma_next * epsilon
        else:
            # The variance of the posterior q(x_next | x, actions).
            added = sigma_next / sigma * jnp.sqrt(jnp.maximum(1 - jnp.square(alpha / alpha_next), 0.0))
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(keys)
            kept = jnp.sqrt(jnp.maximum(jnp.square(sigma_next) - jnp.square(added), 0.0))
            x = alpha_next * actions + kept * epsilon + added * fresh
        x = x.astype(noise.dtype)
        return x, x if path else None

    x, points = jax.lax.scan(step, noise, jnp.arange(num_steps))
    return x if points is None else (x, jnp.concatenate([noise[None], jnp.asarray(points)]))
