"""Training state, and its two items in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pi0_jax.training.partition import combine, flat, partition


class TrainState(NamedTuple):
    """Everything that training carries from step to step, and that a checkpoint has to hold."""

    step: Int[Array, ""]
    """Number of updates made."""
    params: Any
    """Trainable parameters."""
    opt_state: optax.OptState
    ema: Any | None
    """Moving average of `params`, which inference uses; None where it is off."""
    frozen: Any | None = None
    """Frozen parameters, in bfloat16; None where there are none."""

    @property
    def weights(self) -> Any:
        """The weights for inference: the moving average where there is one, and the frozen parameters."""
        return combine(self.params if self.ema is None else self.ema, self.frozen)


def create(
    weights, optimizer: optax.GradientTransformation, *, ema: Any = None, frozen: Iterable[str] = ()
) -> TrainState:
    """The state before the first update; the moving average starts at the parameters, as in openpi.

    Args:
        weights, frozen: all parameters, and the paths of those that are not trained.
        optimizer: of the trainable ones.
        ema: dtype of the moving average; None: there is none.
    """
    params, others = partition(weights, frozen)
    average = None if ema is None else jax.tree.map(lambda x: jnp.array(x, ema), params)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), others)
    return TrainState(jnp.int32(0), params, optimizer.init(params), average, stored)


def split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """The weights for inference, and what else training needs, without storing any weight twice."""
    others: dict[str, Any] = {"step": state.step, "opt_state": state.opt_state}
    return state.weights, others if state.ema is None else others | {"params": state.params}


def join(weights, others: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `split`, for a state with the trees of `like`."""
    trainable, frozen = partition(weights, flat(like.frozen))
    if "params" in others:
        return TrainState(others["step"], others["params"], others["opt_state"], trainable, frozen)
    return TrainState(others["step"], trainable, others["opt_state"], None, frozen)
