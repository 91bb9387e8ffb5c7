"""The compiled parts of a run, built from its configuration and a mesh alone: no weights and no demonstrations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.linen import meta
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray

from pi0_jax import pi0
from pi0_jax.batch import Batch
from pi0_jax.config import FlowConfig, TrainConfig
from pi0_jax.data.augment import make_augment
from pi0_jax.data.normalization import Stats
from pi0_jax.data.robots import Robot
from pi0_jax.model.heads import Network, make_network
from pi0_jax.training import optimizer, sharding
from pi0_jax.training.inputs import trained_model
from pi0_jax.training.partition import combine, flat, frozen_names, partition
from pi0_jax.training.state import TrainState, create
from pi0_jax.training.step import Metrics, make_update


class Program(NamedTuple):
    """What a run computes; each part is compiled when it is called first, or by its `lower`."""

    network: Network
    """Whole, for its parameters; what is computed leaves out cameras that no robot has."""
    boxed: Any
    """Shapes of the parameters that are trained, with their logical axis names."""
    shapes: TrainState
    """Of the state, and where each array lives."""
    start: Callable[[Any], TrainState]
    """From the first weights, which it takes over, to the first state."""
    update: Callable[..., tuple[TrainState, Metrics]]
    """Of seed, state, batch and weights that it only reads; donates the state that it is given."""
    update_mean: Callable[..., tuple[TrainState, Metrics]]
    """The same for the first `flow.mean_steps` updates."""
    evaluate: Callable[[Any, Batch, PRNGKeyArray], tuple[Array, Metrics]]
    """Loss of given weights on a batch, with the noise and times of a key."""
    straightness: Callable[[Any, Batch, PRNGKeyArray], Array] | None
    """Of the flow of given weights on a batch; None for what is no flow."""
    place: Callable[[Batch], Batch]
    """Puts a batch on the devices: this process's part of it in, the whole batch out."""


def build(config: TrainConfig, mesh: Mesh, robot: Robot, stats: Stats, rows: np.ndarray) -> Program:
    """Builds the parts of a run.

    Args:
        config: of the run.
        mesh: of `sharding.make_mesh`; its devices may be ones that only a compiler knows.
        robot: whose planar axes the square's symmetries act on.
        stats: that state and actions are normalised by.
        rows: of each batch, the examples that this process has (`sharding.local_rows`).

    Raises:
        ValueError: the batch does not divide over the devices, the schedule has no room to decay in, or the patterns of
            what is frozen do not fit the model.
    """
    batch_placement = sharding.batch_sharding(mesh, config.batch_size, config.parts)
    schedule = optimizer.make_schedule(config.optim, config.num_steps)
    network = make_network(config.policy.model)
    weights = jax.eval_shape(functools.partial(pi0.init_params, network), jax.random.key(0))
    frozen = frozen_names(config.tune, config.policy.model, flat(weights))
    boxed = partition(weights, frozen)[0]
    computed = make_network(trained_model(config))
    transform = optimizer.make_optimizer(config.optim, schedule, boxed)
    ema = None if config.optim.ema_decay is None else config.optim.ema_dtype
    start = functools.partial(create, optimizer=transform, ema=ema, frozen=frozen)
    boxed_state = jax.eval_shape(start, weights)
    placement = sharding.shardings(mesh, boxed_state)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), meta.unbox(boxed_state), placement
    )

    def compiled_update(flow: FlowConfig):
        draw = functools.partial(pi0.draw, computed.config, flow=flow, reflow=config.reflow_from is not None)
        whole = sharding.keep_batch_divided(mesh, functools.partial(_error, computed, flow, config.parts))
        augmented = make_augment(config.augment, robot, stats, config.policy.normalization, config.policy.model.cameras)

        # The seed is an argument, so that runs which differ in it alone share their compiled programs.
        def update(seed, state: TrainState, *rest):
            def error(params, *args):
                return whole(combine(params, state.frozen), *args)

            make = make_update(
                draw, error, augmented, transform, schedule, ema_decay=config.optim.ema_decay, seed=seed,
                parts=config.parts,
            )  # fmt: skip
            return make(state, *rest)

        return jax.jit(update, donate_argnums=1, out_shardings=(placement, None))

    # Whatever training does, validation counts the steps inside episodes alone, which also drops the last batch's fill.
    validation_flow = dataclasses.replace(
        config.flow, mask_padded_steps=True, coupling="independent", drop_prompt=0.0, drop_images=0.0, drop_both=0.0
    )
    is_flow = config.policy.model.prediction in ("velocity", "average_velocity")
    return Program(
        network,
        boxed,
        shapes,
        jax.jit(start, out_shardings=placement, donate_argnums=0),
        compiled_update(config.flow),
        compiled_update(dataclasses.replace(config.flow, samples_per_observation=1, mean_draw=True)),
        jax.jit(sharding.keep_batch_divided(mesh, functools.partial(_loss, computed, validation_flow))),
        jax.jit(functools.partial(pi0.flow_straightness, computed)) if is_flow else None,
        functools.partial(sharding.place, placement=batch_placement, batch_size=config.batch_size, rows=rows),
    )


def _loss(network: Network, flow: FlowConfig, params, batch: Batch, key: PRNGKeyArray, *teacher):
    return pi0.loss(network, params, batch, key, flow, *teacher)


def _error(network: Network, flow: FlowConfig, parts: int, params, examples: pi0.Examples, total, *teacher):
    return pi0.error(network, params, examples, total, flow, *teacher, parts=parts)
