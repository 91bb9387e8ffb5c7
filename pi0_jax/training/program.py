"""The compiled functions of a run, built from what was resolved: no weights and no demonstrations."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax.linen import meta
from jaxtyping import Array, Key

from pi0_jax import pi0
from pi0_jax.batch import Batch
from pi0_jax.flow.straightness import straightness
from pi0_jax.sampler import Euler
from pi0_jax.training import sharding
from pi0_jax.training.resolve import Run
from pi0_jax.training.state import TrainState, create
from pi0_jax.training.step import Augment, Metrics, make_update

AFTER_WARMUP = 2**30
"""Step at which held-out data are measured: objectives that begin otherwise than they go on have begun."""

OVERLAP = "xla_gpu_enable_latency_hiding_scheduler"
"""XLA's option under which GPUs send beside kernels, and not between them. Since Hopper XLA does so without it."""


class Program(NamedTuple):
    """What a run computes; each function is compiled when it is called first, or by its `lower`."""

    shapes: TrainState
    """Shapes of the state, and where each array lives."""
    start: Callable[[Any], TrainState]
    """Initial weights (donated) → initial state."""
    update: Callable[..., tuple[TrainState, Metrics]]
    """Seed, state (donated), batch and teacher parameters if the objective has a teacher → next state and metrics."""
    evaluate: Callable[[Any, Batch, Key[Array, ""]], Array]
    """Weights, batch and key → validation loss, with the noise and times of the key."""
    straightness: Callable[[Any, Batch, Key[Array, ""]], Array] | None
    """Weights, batch and key → straightness of the flow; None for what is no flow."""
    place: Callable[[Batch], Batch]
    """This process's examples of a batch → the whole batch on the devices."""


def build(run: Run, augment: Augment) -> Program:
    """Builds the functions of a run, in which `augment` changes batches at random."""
    optim = run.config.optim
    ema = None if optim.ema_decay is None else optim.ema_dtype
    start = functools.partial(create, optimizer=run.optimizer, ema=ema, frozen=run.frozen)
    boxed = jax.eval_shape(start, run.weights)
    placement = sharding.shardings(run.mesh, boxed)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), meta.unbox(boxed), placement)
    update = make_update(
        run.objective,
        augment,
        run.optimizer,
        run.schedule,
        ema_decay=optim.ema_decay,
        grad_accum_steps=run.config.grad_accum_steps,
        **({"prepare": run.objective.network.unrolled} if _unrolls(run) else {}),
    )

    def evaluate(weights, batch: Batch, key) -> Array:
        return pi0.loss(run.validation, weights, batch, key, AFTER_WARMUP)[0]

    def measure_straightness(weights, batch: Batch, key) -> Array:
        noise = jax.random.normal(key, batch.actions.shape)
        options = pi0.SampleOptions(sampler=Euler(num_steps=20))
        return straightness(pi0.sample_path(run.objective, weights, batch.observation, noise, options))

    constrained = functools.partial(sharding.with_constraints, run.mesh, run.weights)
    return Program(
        shapes=shapes,
        start=jax.jit(start, out_shardings=placement, donate_argnums=0),
        update=jax.jit(
            constrained(update),
            donate_argnums=1,
            out_shardings=(placement, None),
            compiler_options=compiler_options(run.mesh.devices.flat[0].platform, run.mesh.size),
        ),
        evaluate=jax.jit(constrained(evaluate)),
        straightness=None if run.objective.flow is None else jax.jit(measure_straightness),
        place=functools.partial(
            sharding.place, placement=run.batch_placement, batch_size=run.config.batch_size, rows=run.rows
        ),
    )


def compiler_options(platform: str, devices: int) -> dict[str, Any]:
    """XLA's options of updates: on several GPUs `OVERLAP`, unless XLA_FLAGS in the environment has it.

    Args:
        platform: of the devices, as JAX names it.
        devices: how many there are.
    """
    several = devices > 1 and platform in ("gpu", "cuda")
    return {OVERLAP: True} if several and OVERLAP not in os.environ.get("XLA_FLAGS", "") else {}


def _unrolls(run: Run) -> bool:
    """Whether layers of the backbone are unrolled in training: on one GPU, where copies to and from stacks are a tenth
    of the bytes. Frozen weights stay in their stacks, because the backward pass would keep copies of all of them."""
    return run.mesh.size == 1 and run.mesh.devices.flat[0].platform in ("gpu", "cuda") and not run.frozen
