"""One update: augment, loss, gradient, clip and optimize, moving average."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pi0_jax.batch import Batch
from pi0_jax.training.rounding import average
from pi0_jax.training.state import TrainState

Loss = Callable[..., tuple[Float[Array, ""], dict[str, Array]]]
"""Of parameters, batch, key, and weights that it only reads."""
Augment = Callable[[PRNGKeyArray, Batch], Batch]
Metrics = dict[str, Array]


def make_update(
    loss: Loss,
    augment: Augment,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    ema_decay: float | None,
    seed: int | Int[Array, ""],
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The pure function of one update; the caller compiles it, with the state donated.

    All randomness of a step comes from `seed` and the step's number, so a run can be taken up at any step, and from
    one key for the whole batch, so it is the same on any number of devices.

    Args:
        loss: of parameters, batch, key and what else the function is given; returns the value and metrics.
        augment: random changes to a batch.
        optimizer: includes clipping and the learning rate.
        schedule: the learning rate, for the metrics.
        ema_decay: of the moving average of the parameters; None where the state has none.
        seed: of the run.

    Returns:
        A function of state, batch and weights that the loss only reads (reflow's teacher), to the next state and scalar
        metrics: those of the loss, `grad_norm` before clipping, `param_norm` after the update, `learning_rate`. A state
        is finite if the loss and the two norms are.
    """

    def update(state: TrainState, batch: Batch, *frozen) -> tuple[TrainState, Metrics]:
        augment_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        batch = augment(augment_key, batch)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, loss_key, *frozen)
        change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, change)
        ema = state.ema
        if ema is not None and ema_decay is not None:
            ema = average(ema, params, ema_decay, jax.random.fold_in(loss_key, 6))
        metrics = metrics | {
            "grad_norm": optax.tree.norm(gradient),
            "param_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    return update
