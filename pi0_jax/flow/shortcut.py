"""Shortcut models: a velocity that knows how long a step it is for (Frans et al. 2024, arXiv 2410.12557).

s(x, t, d) is the average velocity from t to t - d. At d = 0 it is the flow's velocity, learned from data; for d = 1,
1/2, …, 1/64 it is trained on its own bootstrap target: one step of d equals two steps of d / 2. A sampler of n = 1, 2,
4, …, 64 steps passes d = 1 / n. One of any other number passes d = 0: the network's output means nothing at a span that
it was not trained for.

Of today's few-step objectives this one was chosen because it needs no derivative by the time. MeanFlow (arXiv
2505.13447) does, and π0's time embedding, whose shortest period is 0.004, has derivatives near 1600.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pi0_jax.flow.path import Chunk

AverageVelocity = Callable[[Array, Array, Array], Array]
"""Average velocity from the point x at time t over the span d; t and d have one value per chunk."""
LEVELS = 7
"""Spans are 2 ** -k for k = 0 … LEVELS - 1; half of the smallest is taken for 0."""
MAX_STEPS = 2 ** (LEVELS - 1)
"""Steps of the shortest span in training."""


def sample_spans(key: Key[Array, ""], shape: tuple[int, ...]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Draws a time and a span that fits between it and 0: time = span · k for a whole k, so that steps line up."""
    level_key, start_key = jax.random.split(key)
    span = 2.0 ** -jax.random.randint(level_key, shape, 0, LEVELS)
    starts = jnp.round(1 / span)
    k = 1 + jnp.floor(jax.random.uniform(start_key, shape) * starts)
    return jnp.minimum(k, starts) * span, span


def sampling_span(num_steps: int) -> float:
    """The span that a sampler of so many steps passes: 1 / num_steps if training had it, else 0, the velocity."""
    trained = num_steps <= MAX_STEPS and num_steps & (num_steps - 1) == 0
    return 1.0 / num_steps if trained else 0.0


def bootstrap_target(average: AverageVelocity, x: Chunk, time: Float[Array, "*b"], span: Float[Array, "*b"]) -> Chunk:
    """The average velocity over `span` of two steps of half of it; without gradient, as it is a target."""
    half = span / 2
    passed = jnp.where(half * MAX_STEPS < 1, 0.0, half)
    first = average(x, time, passed)
    second = average(x - half[..., None, None] * first, time - half, passed)
    return jax.lax.stop_gradient((first + second) / 2)
