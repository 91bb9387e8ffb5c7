"""One update: augment, loss, gradient, clip and optimize, moving average.

Where a batch is too large for the memory it is computed in parts, one after another. Everything random is drawn for the
whole batch, and losses divide by what counts in the whole batch, so the parts' gradients add up to the batch's.

An update whose loss or gradient is not finite leaves the state as it was, but for the number of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pi0_jax.batch import Batch
from pi0_jax.training.low_precision import average
from pi0_jax.training.state import TrainState

Draw = Callable[[Batch, PRNGKeyArray], tuple[Any, Int[Array, ""]]]
"""A batch with all that is drawn for it, a tree whose arrays count examples first; and how much of it counts."""
Error = Callable[..., Float[Array, ""]]
"""Of parameters, some of the examples, how much counts in all of them, and weights that it only reads: their share of
the loss."""
Augment = Callable[[PRNGKeyArray, Batch], Batch]
Metrics = dict[str, Array]


def make_update(
    draw: Draw,
    error: Error,
    augment: Augment,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    ema_decay: float | None,
    seed: int | Int[Array, ""],
    parts: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The pure function of one update; the caller compiles it, with the state donated.

    All randomness of a step comes from `seed` and the step's number, so a run can be taken up at any step, and from
    one key for the whole batch, so it is the same on any number of devices and in any number of parts.

    Args:
        draw, error: the two halves of the loss (`pi0.draw`, `pi0.error`).
        augment: random changes to a batch.
        optimizer: includes clipping and the learning rate.
        schedule: the learning rate, for the metrics.
        ema_decay: of the moving average of the parameters; None where the state has none.
        seed: of the run.
        parts: that a batch is computed in.

    Returns:
        A function of state, batch and weights that the loss only reads (reflow's teacher), to the next state and scalar
        metrics: `loss`, `grad_norm` before clipping, `param_norm` after the update, `learning_rate`, and `skipped`, 1
        where loss or gradient was not finite and nothing was updated.
    """

    def update(state: TrainState, batch: Batch, *read) -> tuple[TrainState, Metrics]:
        augment_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        examples, total = draw(augment(augment_key, batch), loss_key)

        def share(params, some):
            return error(params, some, total, *read)

        loss, gradient = value_and_gradient(share, state.params, examples, parts)
        change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, change)
        ema = state.ema
        if ema is not None and ema_decay is not None:
            ema = average(ema, params, ema_decay, jax.random.fold_in(loss_key, 6))
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            {"params": params, "opt_state": opt_state, "ema": ema},
            {"params": state.params, "opt_state": state.opt_state, "ema": state.ema},
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(kept["params"]),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "skipped": 1.0 - finite,
        }
        return state._replace(step=state.step + 1, **kept), metrics

    return update


def value_and_gradient(share: Callable[..., Float[Array, ""]], params, examples, parts: int):
    """The loss of a batch and its gradient, computed in parts and added up in float32.

    Args:
        share: of parameters and some examples, their share of the loss.
        params: to differentiate by.
        examples: a tree whose arrays count examples first.
        parts: how many; divides the number of examples.
    """
    if parts == 1:
        return jax.value_and_grad(share)(params, examples)

    def add(so_far, some):
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), so_far, jax.value_and_grad(share)(params, some)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    return jax.lax.scan(add, (jnp.float32(0.0), zeros), in_parts(examples, parts))[0]


def in_parts(examples, parts: int):
    """Examples with a new first axis over parts: part i are the examples i, i + parts, i + 2 · parts and so on.

    Devices that have successive examples of the batch then have an equal share of each part, and nothing moves.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), examples)
