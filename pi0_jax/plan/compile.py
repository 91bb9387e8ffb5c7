"""The program of a run from shapes alone, and what the compiler says of it. Nothing is ever allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pi0_jax import compat
from pi0_jax.batch import Batch
from pi0_jax.config import TrainConfig
from pi0_jax.data.augment import make_augment
from pi0_jax.plan.hlo_collectives import KINDS, traffic
from pi0_jax.training import sharding
from pi0_jax.training.program import Program, build
from pi0_jax.training.resolve import Run, batch_shapes, resolve


class Compiled(NamedTuple):
    """The compiler's account of one update on each device."""

    peak: float
    """Bytes of memory."""
    comm_bytes: dict[str, float]
    """Bytes sent, by kind of collective; NaN where the program does not fit."""


def build_program(config: TrainConfig, devices: Sequence[Any]) -> tuple[Run, Program, Batch]:
    """A run on the given devices, its program, and shapes of a batch.

    Symmetries are left out: they take statistics, and little memory or time. Frozen weights need no checkpoint yet.
    """
    run = resolve(dataclasses.replace(config, init_from=config.init_from or "weights"), devices)
    changes = dataclasses.replace(config.augment, square_symmetries=False)
    cameras = config.policy.model.cameras
    program = build(run, make_augment(changes, run.robot, {}, config.policy.normalization, cameras))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=run.batch_placement),
        batch_shapes(run.policy.model, config.batch_size),
    )
    return run, program, batch


def update_shapes(run: Run, program: Program, batch: Batch) -> tuple[Any, ...]:
    """Shapes of the arguments of `Program.update`."""
    teacher = () if run.objective.teacher is None else (program.shapes.weights,)
    return jax.ShapeDtypeStruct((), np.uint32), program.shapes, batch, *teacher


def resident_bytes(program: Program, batch: Batch) -> dict[str, int]:
    """Bytes on each device that stay from step to step, by kind."""
    state = program.shapes
    kinds = {"parameters": state.params, "optimizer": (state.step, state.opt_state), "average": state.ema}
    kinds |= {} if state.frozen is None else {"frozen": state.frozen}
    return {name: placed_bytes(tree) for name, tree in (kinds | {"batch": batch}).items()}


def placed_bytes(shapes) -> int:
    """Bytes on each device of a tree of shapes with shardings."""
    return sharding.bytes_per_device(shapes, jax.tree.map(lambda x: x.sharding, shapes))


def compile_update(program: Program, inputs: Sequence[Any]) -> Compiled:
    """Compiles the update for inputs of the shapes of `update_shapes`."""
    lowered = program.update.lower(*inputs)  # pyright: ignore[reportFunctionMemberAccess]
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := compat.bytes_of_refused_program(error)) is None:
            raise
        return Compiled(refused, dict.fromkeys(KINDS, math.nan))
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = arguments + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(float(peak), traffic(compiled.as_text()))
