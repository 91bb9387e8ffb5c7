"""One update: augment, draw, loss, gradient, clip and optimize, moving average.

Where a batch is too large for the memory it is computed in microbatches, one after another. Everything random is drawn
for the whole batch, and a microbatch's loss is its sum of errors divided by the number of loss entries of the whole
batch, so losses and gradients of the microbatches add up to the batch's.

An update whose loss or gradient is not finite leaves parameters, optimizer state and moving average as they were; only
the step number goes on. `guard.py` stops a run after too many of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from pi0_jax.batch import Batch
from pi0_jax.objective import Draws, Metrics, Objective, Params
from pi0_jax.training.low_precision import average
from pi0_jax.training.partition import combine
from pi0_jax.training.state import TrainState

Augment = Callable[[Key[Array, ""], Batch], Batch]


def make_update(
    objective: Objective,
    augment: Augment,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    ema_decay: float | None,
    grad_accum_steps: int = 1,
    prepare: Callable[[Params], Params] = lambda params: params,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The pure function of one update; the caller compiles it, with the state donated.

    All randomness of a step comes from the seed and the step's number, so a run can be resumed at any step. It is drawn
    for the whole batch, so it is the same on any number of devices and in any number of microbatches. The seed is an
    argument of the update, so that runs which differ in it alone share their compiled programs.

    Args:
        objective: its `draw` and `loss` are used.
        augment: random changes to a batch (`data/augment.py`).
        optimizer: includes clipping and the learning rate.
        schedule: the learning rate, for the metrics.
        ema_decay: of the moving average of the trainable parameters; None where the state has none.
        grad_accum_steps: microbatches per batch.
        prepare: rewrites the parameters for the loss.

    Returns:
        A function (seed, state, batch, *teacher_params) → next state and scalar metrics: `loss`, `grad_norm` before
        clipping, `param_norm` after the update (both of trainable parameters), `learning_rate`, `skipped`, which is 1
        where loss or gradient was not finite and nothing was updated, and those of the objective.
    """

    def update(seed: Array | int, state: TrainState, batch: Batch, *teacher: Params) -> tuple[TrainState, Metrics]:
        augment_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        # The augmented examples with their noise and times, and the number of the batch's entries in the loss.
        draws, count = objective.draw(augment(augment_key, batch), loss_key, state.step)

        def microbatch_loss(params: Params, draws: Draws) -> tuple[Float[Array, ""], Metrics]:
            return objective.loss(prepare(combine(params, state.frozen)), draws, count, *teacher)

        # `state.params` are the trainable parameters alone: frozen ones have no gradient, optimizer state or average.
        (loss, objective_metrics), gradient = value_and_gradient(microbatch_loss, state.params, draws, grad_accum_steps)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and ema_decay is not None:
            # The key is for stochastic rounding, where the average is stored in bfloat16.
            ema = average(ema, params, ema_decay, jax.random.fold_in(loss_key, 6))
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            {"params": params, "opt_state": opt_state, "ema": ema},
            {"params": state.params, "opt_state": state.opt_state, "ema": state.ema},
        )
        metrics = objective_metrics | {
            "loss": loss,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(kept["params"]),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "skipped": 1.0 - finite,
        }
        return state._replace(step=state.step + 1, **kept), metrics

    return update


def value_and_gradient(
    loss: Callable[[Params, Draws], tuple[Float[Array, ""], Metrics]],
    params: Params,
    draws: Draws,
    num_microbatches: int,
) -> tuple[tuple[Float[Array, ""], Metrics], Any]:
    """Loss and metrics of a batch, and its gradient, computed in microbatches and added up in float32.

    Args:
        loss: loss and metrics of a microbatch, both scaled so that their sums over the microbatches are the batch's.
        params: to differentiate by.
        draws: a tree of arrays whose first axes are over examples.
        num_microbatches: divides the number of examples.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if num_microbatches == 1:
        return gradient(params, draws)

    def accumulate(total, microbatch):
        (value, metrics), grads = gradient(params, microbatch)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (value, grads)), metrics

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    (value, grads), metrics = jax.lax.scan(accumulate, (jnp.float32(0.0), zeros), microbatches(draws, num_microbatches))
    return (value, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)), grads


def microbatches(draws: Draws, num: int) -> Draws:
    """Draws with a new first axis over `num` microbatches: number i has the examples i, i + num, i + 2 · num and so on.

    Each device holds a contiguous run of examples, so every microbatch takes equally many from each device, and no
    example moves to another one.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1), draws)
