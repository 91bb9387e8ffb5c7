"""Real-time chunking: a new chunk goes on where the one that the robot is executing leads, in three ways.

They are wrappers of a velocity; whatever takes a velocity takes one of these. The papers' time runs the other way,
tau = 1 - t with velocity -v; the formulas here are in t (`path.py`) throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.flow.path import Chunk, Path, Straight, Time, Velocity, estimate

Schedule = Literal["exp", "linear", "ones", "zeros"]


class Previous(NamedTuple):
    """What is left of the chunks that are being executed, for a batch of new chunks."""

    actions: Float[Array, "b ah ad"]
    """Normalised as the new chunk's actions are; the first one is due when the new chunk's first one is. Anything
    finite from `end` on."""
    delay: Int[Array, "b"]
    """How many of them are executed before the new chunk can be."""
    end: Int[Array, "b"]
    """How many of them count; 0 where there is no previous chunk."""


def prefix_weights(
    delay: Int[Array, "*b"], end: Int[Array, "*b"], horizon: int, schedule: Schedule = "exp"
) -> Float[Array, "*b ah"]:
    """How much each action of a new chunk is held to the previous chunk's (arXiv 2506.07339, equation 5).

    1 for the first `delay`, which will have been executed; 0 from `end` on, where the previous chunk says nothing; and
    between them what the schedule makes of c, which falls linearly from 1 at `delay` - 1 to 0 at `end`.

    Args:
        delay: steps that are certain; counted as `end` where it is larger.
        end: steps that the previous chunk still has, in the paper H - s.
        horizon: H, steps of the new chunk.
        schedule: "exp" c (e^c - 1) / (e - 1), the paper's; "linear" c; "ones" 1; "zeros" 0.

    """
    step = jnp.expand_dims(jnp.arange(horizon), range(jnp.ndim(end)))
    end = jnp.asarray(end)[..., None]
    start = jnp.minimum(jnp.asarray(delay)[..., None], end)
    c = (end - step) / (end - start + 1)
    between = {"exp": c * jnp.expm1(c) / (math.e - 1), "linear": c, "ones": jnp.ones_like(c), "zeros": 0.0 * c}
    return jnp.where(step < start, 1.0, jnp.where(step < end, between[schedule], 0.0))


def real_time_chunking(
    velocity: Velocity,
    previous: Previous,
    schedule: Schedule = "exp",
    max_guidance: float | Float[Array, ""] = 5.0,
    *,
    path: Path = Straight(),
    through_network: bool = True,
) -> Velocity:
    """Real-time chunking (arXiv 2506.07339, algorithm 1): pulls a sample towards the previous chunk's actions.

    How far the one-step denoised estimate is from the previous actions, weighted by `prefix_weights`, is carried back
    to x by the vector-Jacobian product of the estimate (ΠGDM guidance, Song et al. 2023), network included, so one
    evaluation costs a backward pass as well.

    Args:
        velocity: dx/dt, differentiable in x.
        previous: what is left of the chunks in execution. Examples with `end` 0 get the velocity unchanged.
        schedule: of the weights; LeRobot's is linear.
        max_guidance: the paper's beta, bound of the factor of the correction, which is infinite at both ends of time;
            LeRobot's is 10.
        path: of the velocity.
        through_network: False: LeRobot's variant, whose Jacobian is the identity. It needs no backward pass.

    Returns:
        The guided velocity.
    """
    weights = prefix_weights(previous.delay, previous.end, previous.actions.shape[-2], schedule)[..., None]

    def guided(x, time, *features):
        def denoise(x):
            v = velocity(x, time, *features)
            return estimate(path, v, x, time, "velocity").data, v

        if through_network:
            denoised, vjp, v = jax.vjp(denoise, x, has_aux=True)
            (correction,) = vjp(weights * (previous.actions - denoised))
        else:
            denoised, v = denoise(x)
            correction = weights * (previous.actions - denoised)
        factor = guidance_factor(time, max_guidance, path)
        return jnp.where(previous.end[..., None, None] > 0, v - factor * correction, v)

    return guided


def guidance_factor(
    time: Time,
    max_guidance: float | Float[Array, ""],
    path: Path = Straight(),
) -> Float[Array, ""]:
    """Factor of the correction, (alpha² + sigma²) (sigma'/sigma - alpha'/alpha), at most `max_guidance`.

    On the straight path that is ((1 - t)² + t²) / (t (1 - t)); the paper has (1 - tau) / (tau r²) with
    r² = (1 - tau)² / (tau² + (1 - tau)²), which is the same.
    """
    c = path.at(time)
    odds = jnp.maximum(c.alpha * c.sigma, 1e-9)
    slope = c.d_sigma * c.alpha - c.d_alpha * c.sigma
    return jnp.minimum((c.alpha**2 + c.sigma**2) * slope / odds, max_guidance)


def continue_prefix(velocity: Velocity, previous: Previous) -> tuple[Velocity, Callable[[Chunk], Chunk]]:
    """Training-time real-time chunking (arXiv 2512.05964): for networks that learned to go on from clean actions.

    The first `delay` actions are the previous chunk's from the start and stay, bit for bit; the network sees them at
    flow time 0. `Previous.end` has no part in it.

    Args:
        velocity: takes one time per action, `[b ah]`.
        previous: whose delay is at most what the network was trained for.

    Returns:
        The velocity, and a function that puts the prefix into a point: for the noise, and after every step.
    """

    def project(x):
        return jnp.where(is_clean(previous.delay, x.shape[-2])[..., None], previous.actions, x)

    def continued(x, time):
        frozen = is_clean(previous.delay, x.shape[-2])
        return jnp.where(frozen[..., None], 0.0, velocity(x, jnp.where(frozen, 0.0, time)))

    return continued, project


def is_clean(delay: Int[Array, "*b"], horizon: int) -> Bool[Array, "*b ah"]:
    """True for the first `delay` actions of a chunk, those without noise."""
    steps = jnp.expand_dims(jnp.arange(horizon), range(jnp.ndim(delay)))
    return steps < jnp.asarray(delay)[..., None]
