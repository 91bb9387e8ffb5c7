"""DDIM and DDPM: the denoised estimate put back on the path at the next time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pi0_jax.errors import UserError
from pi0_jax.flow.path import Chunk
from pi0_jax.sampler.solver import Flow, Solver, State, Step


@dataclasses.dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (Song et al. 2021, arXiv 2010.02502, equation 12) on any Gaussian path; on the straight one with eta 0 and
    without a clip, it is Euler's method."""

    eta: float = 0.0
    """Share of the posterior's standard deviation that each step adds as fresh noise: 0 is deterministic, 1 is DDPM's
    ancestral sampling on this grid."""
    clip: float | None = 3.0
    """Largest absolute value of the denoised actions on the way, normalised units: near t = 1 noise says little of
    them. 1 suits quantile normalisation. None: no clip."""

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM.eta is {self.eta}; it is a share, between 0 (deterministic) and 1 (DDPM).")

    @property
    def stochastic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.eta > 0

    def step(self, flow: Flow, x: Chunk, step: Step, state: State) -> tuple[Chunk, State]:
        now, then = flow.path.at(step.time), flow.path.at(step.next)
        data, noise = flow.estimate(x, step.time, *step.features)
        if self.clip is not None:
            data = jnp.clip(data, -self.clip, self.clip)
            noise = (x - now.alpha * data) / now.sigma
        if not self.eta:
            return then.alpha * data + then.sigma * noise, state
        # Standard deviation of the posterior q(x_next | x, data).
        forward = jnp.square(now.sigma) - jnp.square(now.alpha / then.alpha * then.sigma)
        added = self.eta * then.sigma / now.sigma * jnp.sqrt(jnp.maximum(forward, 0.0))
        kept = jnp.sqrt(jnp.maximum(jnp.square(then.sigma) - jnp.square(added), 0.0))
        assert step.keys is not None
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step.index), x.shape[1:]))
        return then.alpha * data + kept * noise + added * draw(step.keys), state
