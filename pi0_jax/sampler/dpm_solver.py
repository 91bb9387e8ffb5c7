"""DPM-Solver++: an exponential integrator of the denoised estimate in the logarithm of alpha / sigma."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pi0_jax.flow.path import Chunk
from pi0_jax.sampler.solver import Flow, Solver, State, Step


@dataclasses.dataclass(frozen=True)
class DPMSolver2M(Solver):
    """DPM-Solver++(2M), of order 2 with one evaluation per step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first and the last step, where the logarithm is infinite on some paths, are of order 1, and steps beside them
    are long in it however many there are: from end to end the error falls as log(n) / n².
    """

    def init(self, x: Chunk) -> State:
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), jnp.float32(0.0)

    def step(self, flow: Flow, x: Chunk, step: Step, state: State) -> tuple[Chunk, State]:
        before, h_before = state
        now, then = flow.path.at(step.time), flow.path.at(step.next)
        data = flow.estimate(x, step.time, *step.features).data.astype(before.dtype)
        decay = now.alpha * then.sigma / (then.alpha * now.sigma)  # exp(-h)
        h = -jnp.log(decay)
        inside = jnp.isfinite(h) & jnp.isfinite(h_before) & (h_before > 0)
        weight = jnp.where(inside, h / (2 * jnp.where(inside, h_before, 1.0)), 0.0)
        extrapolated = data + weight * (data - before)
        return then.sigma / now.sigma * x + then.alpha * (1 - decay) * extrapolated, (data, h)
