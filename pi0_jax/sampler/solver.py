"""Contract of a solver: from noise (t = 1) to actions (t = 0) along what a network predicts, as one `lax.scan`.

A solver is a frozen dataclass: its fields are the policy's configuration, `init` and `step` its behaviour, with a state
of its own for multistep methods. A new one is a file in this folder; nothing else has to know of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pi0_jax.errors import UserError
from pi0_jax.flow.path import Chunk, Estimate, Path, Predicts, Straight, Velocity, estimate, to_velocity
from pi0_jax.sampler.grid import Grid, power_grid

State = Any
"""Solver's own state, a tree of arrays that goes from step to step."""


class Flow(NamedTuple):
    """What is integrated: a prediction as a function of (x, t) on a Gaussian path."""

    predict: Velocity
    """`predict(x, t, *features)`; features are what the network computed of the grid's times beforehand."""
    path: Path = Straight()
    predicts: Predicts = "velocity"

    def velocity(self, x: Chunk, time: Array, *features: Any) -> Chunk:
        """dx/dt."""
        return to_velocity(self.path, self.predict(x, time, *features), x, time, self.predicts)

    def estimate(self, x: Chunk, time: Array, *features: Any) -> Estimate:
        """Denoised actions, and the noise in x."""
        return estimate(self.path, self.predict(x, time, *features), x, time, self.predicts)


class Step(NamedTuple):
    """One step of a grid."""

    index: Array
    time: Float[Array, ""]
    next: Float[Array, ""]
    """Time after the step."""
    dt: Float[Array, ""]
    features: tuple[Any, ...]
    """Further arguments of the prediction at `time`."""
    keys: Key[Array, "b"] | None
    """One per chunk, for solvers that draw noise."""


@dataclasses.dataclass(frozen=True)
class Solver:
    """Base of the solvers."""

    num_steps: int = 10
    """Steps from noise to actions."""
    grid_power: float = 1.0
    """Times of the steps are (1 - i / num_steps) to this power: above 1 more of them are near the data."""

    stochastic: ClassVar[bool] = False
    """Whether `step` draws noise, for which it needs keys."""

    @property
    def grid(self) -> Grid:
        return power_grid(self.num_steps, self.grid_power)

    def init(self, x: Chunk) -> State:
        """The state before the first step."""
        return ()

    def step(self, flow: Flow, x: Chunk, step: Step, state: State) -> tuple[Chunk, State]:
        """The point after a step, and the state after it."""
        raise NotImplementedError


def integrate(
    flow: Flow | Velocity,
    noise: Float[Array, "*b ah ad"],
    solver: Solver,
    *,
    grid: Grid | None = None,
    features: Any = None,
    keys: Key[Array, "b"] | None = None,
    project: Callable[[Chunk], Chunk] = lambda x: x,
) -> Float[Array, "*b ah ad"]:
    """Carries `noise` from t = 1 to t = 0.

    Args:
        flow: what to integrate; a plain function of (x, t) is the velocity of a straight path.
        noise: the point at t = 1.
        solver: how.
        grid: times of the steps; None: the solver's own.
        features: tree whose arrays have one row per step: further arguments of the prediction
            (`Network.time_features`).
        keys: one per chunk, for stochastic solvers.
        project: applied to the point before the first step and after each.

    Returns:
        The point at t = 0.

    Raises:
        UserError: the solver has no grid (fewer than one step), or draws noise and got no keys.
    """
    return _scan(flow, noise, solver, grid, features, keys, project, path=False)


def trajectory(
    flow: Flow | Velocity, noise: Float[Array, "*b ah ad"], solver: Solver, **how: Any
) -> Float[Array, "n *b ah ad"]:
    """All points from t = 1 to t = 0, `[num_steps + 1, *b, ah, ad]`; arguments of `integrate`."""
    defaults: dict[str, Any] = {"grid": None, "features": None, "keys": None, "project": lambda x: x}
    return _scan(flow, noise, solver, **(defaults | how), path=True)


def _scan(flow, noise, solver, grid, features, keys, project, *, path: bool):
    flow = flow if isinstance(flow, Flow) else Flow(flow)
    grid = solver.grid if grid is None else grid
    if solver.stochastic and keys is None:
        raise UserError(f"{type(solver).__name__} draws noise at every step: give `keys`, one per chunk.")
    times = jnp.asarray(grid.times)
    start = project(noise)

    def step(carry, inputs):
        x, state = carry
        index, time, following, dt, row = inputs
        x, state = solver.step(flow, x, Step(index, time, following, dt, () if row is None else (row,), keys), state)
        x = project(x.astype(noise.dtype))
        return (x, state), x if path else None

    inputs = (jnp.arange(len(grid.dt)), times[:-1], times[1:], jnp.asarray(grid.dt), features)
    (x, _), points = jax.lax.scan(step, (start, solver.init(start)), inputs)
    return x if points is None else jnp.concatenate([start[None], jnp.asarray(points)])
