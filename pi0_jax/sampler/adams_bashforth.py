"""Adams-Bashforth: the slope of the step before is used again (Hairer, Nørsett, Wanner, Solving ODEs I, III.1)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pi0_jax.flow.path import Chunk
from pi0_jax.sampler.solver import Flow, Solver, State, Step


@dataclasses.dataclass(frozen=True)
class AdamsBashforth2(Solver):
    """The two-step Adams-Bashforth method, of order 2 with one evaluation per step; the first step is Euler's."""

    def init(self, x: Chunk) -> State:
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), jnp.float32(jnp.inf)

    def step(self, flow: Flow, x: Chunk, step: Step, state: State) -> tuple[Chunk, State]:
        before, dt_before = state
        slope = flow.velocity(x, step.time, *step.features).astype(before.dtype)
        half_ratio = step.dt / (2 * dt_before)  # 0 in the first step, which has no slope before it
        return x + step.dt * ((1 + half_ratio) * slope - half_ratio * before), (slope, step.dt)
