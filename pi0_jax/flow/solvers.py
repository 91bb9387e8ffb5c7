"""Explicit Runge-Kutta solvers that carry noise (t = 1) to data (t = 0), as one `lax.scan`.

A solver is a Butcher tableau; adding one is adding a row to `TABLEAUS`.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0_jax.flow.path import Chunk, Velocity

Solver = Literal["euler", "midpoint", "heun", "rk4"]


class Tableau(NamedTuple):
    """Butcher tableau of an explicit method (Hairer, Nørsett, Wanner, Solving ODEs I, II.1)."""

    stages: tuple[tuple[float, ...], ...]
    """Row i: weights of the earlier slopes in stage i; its sum is the stage's time."""
    weights: tuple[float, ...]
    """Weights of the slopes in the step; they sum to 1."""
    order: int
    """The global error falls as the step to this power."""


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(((),), (1.0,), 1),
    "midpoint": Tableau(((), (0.5,)), (0.0, 1.0), 2),
    "heun": Tableau(((), (1.0,)), (0.5, 0.5), 2),
    "rk4": Tableau(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
}


def integrate(
    velocity: Velocity,
    noise: Chunk,
    num_steps: int | Float[Array, "n"],
    solver: Solver = "euler",
    *,
    path: bool = False,
    unroll: bool = False,
):
    """Carries `noise` from t = 1 to t = 0.

    In equal steps the time is accumulated (t + dt) in float32 rather than computed as 1 + i dt, as openpi does: the two
    differ by 1e-7, which the time embedding's shortest period turns into 2e-4.

    Args:
        velocity: dx/dt as a function of x and a scalar t.
        noise: the point at t = 1.
        num_steps: number of equal steps; or the times to stop at, from 1 to 0 (`flow.grid`), which may be traced. The
            velocity is evaluated `len(weights)` times in each step.
        solver: name of the tableau.
        path: also return every point on the way.
        unroll: a straight-line program instead of a loop.

    Returns:
        The point at t = 0; with `path`, that and the `[num_steps + 1, *b, ah, ad]` points from t = 1 to t = 0.

    Raises:
        ValueError: unknown solver, or fewer than one step.
    """
    uniform = isinstance(num_steps, int)
    length = num_steps if uniform else len(num_steps) - 1
    check_solver(solver, length)
    tableau = TABLEAUS[solver]

    def step(carry, dt):
        x, time = carry
        slopes = []
        for row in tableau.stages:
            point = x + sum(dt * a * k for a, k in zip(row, slopes, strict=True) if a)
            slopes.append(velocity(point, time + dt * sum(row)))
        x = x + sum(dt * b * k for b, k in zip(tableau.weights, slopes, strict=True) if b)
        x = x.astype(noise.dtype)
        return (x, time + dt), x if path else None

    steps = jnp.full(length, -1.0 / length, jnp.float32) if uniform else jnp.diff(jnp.asarray(num_steps, jnp.float32))
    (x, _), points = jax.lax.scan(step, (noise, jnp.float32(1.0)), steps, unroll=unroll)
    return x if points is None else (x, jnp.concatenate([noise[None], jnp.asarray(points)]))


def check_solver(solver: str, num_steps: int):
    """Raises ValueError for a solver that does not exist or fewer than one step."""
    if solver not in TABLEAUS:
        close = difflib.get_close_matches(str(solver), TABLEAUS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown solver {solver!r}; there are {', '.join(TABLEAUS)}.{hint}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a solver needs at least 1 step.")
