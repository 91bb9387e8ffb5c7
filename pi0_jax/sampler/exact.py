"""The exact end of a flow, by an adaptive solver of `diffrax` (the extra `exact`): a yardstick, not a sampler."""

from __future__ import annotations

import jax.numpy as jnp

from pi0_jax.errors import UserError, require_package
from pi0_jax.flow.path import Chunk, Velocity


def integrate_exactly(
    velocity: Velocity,
    noise: Chunk,
    *,
    solver: str = "tsit5",
    rtol: float = 1e-5,
    atol: float = 1e-6,
    max_steps: int = 4096,
) -> Chunk:
    """Carries `noise` from t = 1 to t = 0 with steps as small as the tolerances ask.

    Args:
        velocity: dx/dt as a function of x and a scalar t.
        noise: the point at t = 1.
        solver: an embedded Runge-Kutta pair of order 5(4): tsit5, Tsitouras', or dopri5, Dormand and Prince's.
        rtol, atol: relative and absolute error allowed in a step.
        max_steps: steps after which it gives up.

    Raises:
        UserError: diffrax is not installed, or the solver is unknown.
    """
    diffrax = require_package("diffrax", "exact", "the exact sampler")
    solvers = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5}
    if solver not in solvers:
        raise UserError(f"unknown solver {solver!r}; choose tsit5 or dopri5.")
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, _: velocity(x, jnp.asarray(t, jnp.float32))),
        solvers[solver](),
        t0=1.0,
        t1=0.0,
        dt0=None,
        y0=noise,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
    )
    assert solution.ys is not None
    return solution.ys[0]
