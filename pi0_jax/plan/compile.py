"""The program of a run from shapes alone, and what the compiler says of it. Nothing is ever allocated."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pi0_jax import compat, pi0
from pi0_jax.batch import Batch
from pi0_jax.config import ModelConfig, TrainConfig
from pi0_jax.data.normalization import NormStats
from pi0_jax.data.robots import get_robot
from pi0_jax.plan.hlo_collectives import KINDS, traffic
from pi0_jax.training import sharding
from pi0_jax.training.inputs import trained_model
from pi0_jax.training.partition import with_adapters
from pi0_jax.training.program import Program, build


class Compiled(NamedTuple):
    """The compiler's account of one update on each device."""

    peak: float
    """Bytes of memory."""
    comm_bytes: dict[str, float]
    """Bytes sent, by kind of collective; NaN where the program does not fit."""


def build_program(config: TrainConfig, mesh: Mesh) -> tuple[Program, Batch]:
    """The program of a run, and shapes of a batch."""
    config = with_adapters(config)
    robot = get_robot(config.policy.robot)
    sizes = {"state": len(robot.state), "actions": len(robot.actions)}
    stats = {name: NormStats(*(f(n) for f in (np.zeros, np.ones, np.zeros, np.ones))) for name, n in sizes.items()}
    program = build(config, mesh, robot, stats, np.arange(0))
    placement = sharding.batch_sharding(mesh, config.batch_size)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
        batch_shapes(trained_model(config), config.batch_size),
    )
    return program, batch


def batch_shapes(model: ModelConfig, size: int) -> Batch:
    """Shapes of a training batch, as the loader makes it."""

    def make() -> Batch:
        observation, actions, _ = pi0.example_inputs(model, size)
        images = {name: image.astype(jnp.uint8) for name, image in observation.images.items()}
        masks = jnp.ones((size, model.action_horizon), bool), jnp.ones((size, model.action_dim), bool)
        return Batch(observation._replace(images=images), actions, *masks)

    return jax.eval_shape(make)


def resident_bytes(program: Program, batch: Batch) -> dict[str, int]:
    """Bytes on each device that stay from step to step, by kind."""
    state = program.shapes
    kinds = {"parameters": state.params, "optimizer": (state.step, state.opt_state), "average": state.ema}
    kinds |= {} if state.frozen is None else {"frozen": state.frozen}
    return {name: placed_bytes(tree) for name, tree in (kinds | {"batch": batch}).items()}


def placed_bytes(shapes) -> int:
    """Bytes on each device of a tree of shapes with shardings."""
    return sharding.bytes_per_device(shapes, jax.tree.map(lambda x: x.sharding, shapes))


def compile_update(program: Program, batch: Batch) -> Compiled:
    """Compiles the update."""
    lowered = program.update.lower(jax.ShapeDtypeStruct((), np.uint32), program.shapes, batch)  # pyright: ignore
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := compat.bytes_of_refused_program(error)) is None:
            raise
        return Compiled(refused, dict.fromkeys(KINDS, math.nan))
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = arguments + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(peak, traffic(compiled.as_text()))
