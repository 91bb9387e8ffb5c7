"""Wrappers of a velocity that steer it. They know no network, and whatever takes a velocity takes a guided one.

Real-time chunking, three ways, makes a new chunk go on where the one that the robot is executing leads. The papers'
time runs the other way, tau = 1 - t with velocity -v; the formulas here are in t (`path.py`) throughout.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.flow.path import Chunk, Velocity

Schedule = Literal["exp", "linear", "ones", "zeros"]
SCHEDULES: tuple[Schedule, ...] = ("exp", "linear", "ones", "zeros")


class Previous(NamedTuple):
    """What is left of the chunks that are being executed, for a batch of new chunks."""

    actions: Float[Array, "b ah ad"]
    """Normalised as the new chunk's actions are; the first one is due when the new chunk's first one is. Anything
    finite from `end` on."""
    delay: Int[Array, "b"]
    """How many of them are executed before the new chunk can be."""
    end: Int[Array, "b"]
    """How many of them count; 0 where there is no previous chunk."""


def classifier_free(both: Velocity, scale: float | Float[Array, ""]) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): v_uncond + scale · (v_cond − v_uncond).

    It is computed as v_cond + (scale − 1) · (v_cond − v_uncond), so that at scale 1 the result is v_cond exactly.

    Args:
        both: velocity of a batch twice as large: its first half is told the condition, its second half is not.
        scale: 0 ignores the condition, 1 follows it, larger values exaggerate it; may be traced.

    Returns:
        The velocity of the batch itself.
    """

    def guided(x, time):
        time = jnp.asarray(time)
        conditional, unconditional = jnp.split(
            both(jnp.concatenate([x, x]), jnp.concatenate([time, time]) if time.ndim else time), 2
        )
        return conditional + (scale - 1) * (conditional - unconditional)

    return guided


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

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r} of the prefix weights; choose {', '.join(SCHEDULES)}.")
    step = jnp.arange(horizon)
    end = jnp.asarray(end)[..., None]
    start = jnp.minimum(jnp.asarray(delay)[..., None], end)
    c = (end - step) / (end - start + 1)
    between = {"exp": c * jnp.expm1(c) / (math.e - 1), "linear": c, "ones": jnp.ones_like(c), "zeros": 0.0 * c}
    return jnp.where(step < start, 1.0, jnp.where(step < end, between[schedule], 0.0))


def real_time_chunking(
    velocity: Velocity, previous: Previous | None, schedule: Schedule = "exp", max_guidance: float | Array = 5.0
) -> Velocity:
    """Real-time chunking (arXiv 2506.07339, algorithm 1): pulls a sample towards the previous chunk's actions.

    At each point the straight line ahead ends at x - t v(x, t). How far that is from the previous actions, weighted by
    `prefix_weights`, is carried back to x by the vector-Jacobian product of that very map, network included, so one
    evaluation costs a backward pass as well.

    Args:
        velocity: dx/dt, differentiable in x.
        previous: None: the velocity itself is returned. Examples with `end` 0 get it unchanged, too.
        schedule: of the weights.
        max_guidance: the paper's beta, bound of the factor of the correction, which is infinite at both ends of time.

    Returns:
        The guided velocity.
    """
    return _pulled(velocity, previous, schedule, max_guidance, through_network=True)


def identity_real_time_chunking(
    velocity: Velocity, previous: Previous | None, schedule: Schedule = "linear", max_guidance: float | Array = 10.0
) -> Velocity:
    """LeRobot's variant of `real_time_chunking`, whose Jacobian is the identity: the error itself is the correction.

    It needs no backward pass. Arguments as there; the defaults are LeRobot's, and its `execution_horizon` is what
    `Previous.end` is here.
    """
    return _pulled(velocity, previous, schedule, max_guidance, through_network=False)


def continue_prefix(velocity: Velocity, previous: Previous, noise: Chunk) -> tuple[Velocity, Chunk]:
    """Training-time real-time chunking (arXiv 2512.05964): for networks that learned to go on from clean actions.

    The first `delay` actions are the previous chunk's from the start and stay, bit for bit, because their velocity is
    zero; the network sees them at flow time 0. `Previous.end` has no part in it.

    Args:
        velocity: takes one time an action, `[b ah]`.
        previous: whose delay is at most what the network was trained for.
        noise: the point at t = 1.

    Returns:
        The velocity, and the noise with the prefix in it.
    """
    frozen = is_prefix(previous.delay, noise.shape[-2])

    def continued(x, time):
        return jnp.where(frozen[..., None], 0.0, velocity(x, jnp.where(frozen, 0.0, time)))

    return continued, jnp.where(frozen[..., None], previous.actions, noise)


def is_prefix(delay: Int[Array, "*b"], horizon: int) -> Bool[Array, "*b ah"]:
    """True for the first `delay` steps of a chunk."""
    return jnp.arange(horizon) < jnp.asarray(delay)[..., None]


def guidance_factor(time: Float[Array, ""], max_guidance: float | Array) -> Float[Array, ""]:
    """Factor of the correction, ((1 - t)² + t²) / (t (1 - t)), at most `max_guidance`.

    The paper has (1 - tau) / (tau r²) with r² = (1 - tau)² / (tau² + (1 - tau)²), which is the same.
    """
    odds = jnp.maximum(time * (1 - time), 1e-9)
    return jnp.minimum(((1 - time) ** 2 + time**2) / odds, max_guidance)


def _pulled(
    velocity: Velocity, previous: Previous | None, schedule: Schedule, max_guidance, *, through_network: bool
) -> Velocity:
    if previous is None:
        return velocity
    weights = prefix_weights(previous.delay, previous.end, previous.actions.shape[-2], schedule)[..., None]

    def guided(x, time):
        def landing(x):
            v = velocity(x, time)
            return x - time * v, v

        if through_network:
            ahead, back, v = jax.vjp(landing, x, has_aux=True)
        else:
            ahead, v = landing(x)
            back = lambda error: (error,)  # noqa: E731
        (correction,) = back(weights * (previous.actions - ahead))
        return jnp.where(previous.end[..., None, None] > 0, v - guidance_factor(time, max_guidance) * correction, v)

    return guided
