"""The program of a run from shapes alone, and what the compiler says of it. Nothing is ever allocated."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pi0_jax import compat
from pi0_jax.batch import Batch
from pi0_jax.config import TrainConfig
from pi0_jax.data.augment import make_augment
from pi0_jax.flops import Device
from pi0_jax.plan import hlo
from pi0_jax.plan.devices import compiler_options
from pi0_jax.plan.hlo_collectives import KINDS, network_seconds, traffic
from pi0_jax.plan.kernels import Kernel, kernels
from pi0_jax.plan.timeline import Timeline, timeline
from pi0_jax.training import sharding
from pi0_jax.training.program import Program, build
from pi0_jax.training.resolve import Run, batch_shapes, resolve


class Compiled(NamedTuple):
    """The compiler's account of a program on each device."""

    peak: float
    """Bytes of memory."""
    temporaries: float
    """Bytes, of these, besides arguments and results; NaN where the program does not fit."""
    comm_bytes: dict[str, float]
    """Bytes sent, by kind of collective; NaN where the program does not fit."""
    kernels: list[Kernel]
    """Empty for CPUs, for devices without a data sheet, and where the program does not fit."""
    seconds: float
    """To compile."""
    text: str = ""
    """The program."""
    network: float = 0.0
    """Seconds of all collectives by the data sheet."""
    timeline: Timeline | None = None
    """Of GPUs."""


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
        batch_shapes(run.policy.model, run.policy.objective, config.batch_size),
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


def compile_program(
    lowered: jax.stages.Lowered,
    target: Any,
    device: Device | None,
    *,
    triton: bool = True,
    recompute: bool = True,
    unknown_rounds: int | None = None,
) -> Compiled:
    """Compiles a program, and says what it takes.

    Args:
        lowered: the program.
        target: a device that it was lowered for.
        device: the data sheet.
        triton, recompute: as of `devices.compiler_options`.
        unknown_rounds: as of `kernels.kernels`.
    """
    start = time.monotonic()
    options = compiler_options(target, triton=triton, recompute=recompute)
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if options.get("xla_gpu_enable_triton_gemm"):  # some products have no tiles that fit unless they are tuned
            how: Any = {"recompute": recompute, "unknown_rounds": unknown_rounds}
            return compile_program(lowered, target, device, triton=False, **how)
        if (refused := compat.bytes_of_refused_program(error)) is None:
            raise
        return Compiled(refused, math.nan, dict.fromkeys(KINDS, math.nan), [], time.monotonic() - start)
    seconds = time.monotonic() - start
    memory: Any = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:  # libtpu compiles loops of decoding that it cannot print
        return Compiled(float(arguments + temporaries), float(temporaries), dict.fromkeys(KINDS, math.nan), [], seconds)
    program = hlo.parse(text)
    found = Compiled(float(arguments + temporaries), float(temporaries), traffic(program), [], seconds, text)
    if device is None:
        return found
    found = found._replace(network=network_seconds(program, device))
    if target.platform == "cpu":
        return found
    played = None if target.platform == "tpu" else timeline(program, device, unknown_rounds)
    return found._replace(kernels=kernels(program, device, unknown_rounds), timeline=played)
