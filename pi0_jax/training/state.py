"""What one update turns into the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class TrainState(NamedTuple):
    """Everything that training carries from step to step, and that a checkpoint has to hold."""

    step: Int[Array, ""]
    """Number of updates made."""
    params: Any
    opt_state: optax.OptState
    ema: Any | None
    """Moving average of `params`, what inference uses; None where it is off."""

    @property
    def weights(self) -> Any:
        """The weights to run: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def create(params, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first update; the moving average starts at the parameters, as in openpi."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.tree.map(jnp.copy, params) if ema else None)


def split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """The weights to run, and the rest, without storing any weight twice: the two items of a checkpoint."""
    rest: dict[str, Any] = {"step": state.step, "opt_state": state.opt_state}
    return state.weights, rest if state.ema is None else rest | {"params": state.params}


def join(weights, rest: dict[str, Any]) -> TrainState:
    """The inverse of `split`."""
    if "params" in rest:
        return TrainState(rest["step"], rest["params"], rest["opt_state"], weights)
    return TrainState(rest["step"], weights, rest["opt_state"], None)
