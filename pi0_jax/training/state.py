"""What one update turns into the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pi0_jax.training.partition import cast_frozen, combine, flat, partition


class TrainState(NamedTuple):
    """Everything that training carries from step to step, and that a checkpoint has to hold."""

    step: Int[Array, ""]
    """Number of updates made."""
    params: Any
    """Those that are trained."""
    opt_state: optax.OptState
    ema: Any | None
    """Moving average of `params`, what inference uses; None where it is off."""
    frozen: Any | None = None
    """The parameters that are not trained, in bfloat16; None where all are."""

    @property
    def weights(self) -> Any:
        """The weights to run: the moving average where there is one, and what is frozen."""
        return combine(self.params if self.ema is None else self.ema, self.frozen)


def create(
    weights, optimizer: optax.GradientTransformation, *, ema: Any = None, frozen: Iterable[str] = ()
) -> TrainState:
    """The state before the first update; the moving average starts at the parameters, as in openpi.

    Args:
        weights: all of them.
        optimizer: of those that are trained.
        ema: dtype of the moving average; None: there is none.
        frozen: paths of those that are not.
    """
    params, rest = partition(weights, frozen)
    average = None if ema is None else jax.tree.map(lambda x: jnp.array(x, ema), params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), average, rest and cast_frozen(rest))


def split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """The weights to run, and the rest, without storing any weight twice: the two items of a checkpoint."""
    rest: dict[str, Any] = {"step": state.step, "opt_state": state.opt_state}
    return state.weights, rest if state.ema is None else rest | {"params": state.params}


def join(weights, rest: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `split`, for a state with the trees of `like`."""
    trained, frozen = partition(weights, flat(like.frozen))
    if "params" in rest:
        return TrainState(rest["step"], rest["params"], rest["opt_state"], trained, frozen)
    return TrainState(rest["step"], trained, rest["opt_state"], None, frozen)
