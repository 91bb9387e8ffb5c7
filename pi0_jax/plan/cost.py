"""Cost of a run without the hardware: memory, FLOPs, traffic, kernels and time of one update, per device.

The real update is compiled for the device, which need not be there: for TPUs by libtpu, for NVIDIA GPUs by XLA where
`jax[cuda12]` is installed. Memory is what the compiler allotted, traffic what the program sends, and kernels are the
program's (`kernels.py`). Where there is no compiler for GPUs, the same update is compiled for as many CPU devices: what
each device holds and which collectives there are is the same program's, but activations are estimated from what the
backward pass keeps (`kept_for_backward`), because a CPU's temporaries are not a GPU's.

Times are bounds: FLOPs at the data sheet's peak, bytes through memory, each kernel at what bounds it, and bytes sent,
each as if the others cost nothing; and kernels with what they wait for in the order of the program (`timeline.py`). A
step takes at least the largest of them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import meta

from pi0_jax import flops
from pi0_jax.config import ModelConfig, ObjectiveConfig, PolicyConfig, TrainConfig, TuneConfig
from pi0_jax.config.replace import replace
from pi0_jax.objective import make_objective
from pi0_jax.plan.compile import (
    Compiled,
    build_program,
    compile_program,
    placed_bytes,
    resident_bytes,
    update_shapes,
)
from pi0_jax.plan.devices import Device, estimates, find_devices, usable_memory
from pi0_jax.plan.hlo_collectives import KINDS
from pi0_jax.plan.kernels import Cost, total
from pi0_jax.training import sharding
from pi0_jax.training.partition import combine, flat, frozen_names, partition
from pi0_jax.training.program import Program
from pi0_jax.training.resolve import Run, batch_shapes


class Plan(NamedTuple):
    """One update on one device of many. Sizes in bytes, times in seconds."""

    topology: str
    device: Device | None
    """None where its data sheet is unknown."""
    mesh: dict[str, int]
    batch_size: int
    resident_bytes: dict[str, int]
    """What stays from step to step: `parameters`, `optimizer`, `average`, and the `batch`."""
    estimated: bool
    """Whether memory is an estimate; otherwise it is the compiler's."""
    flops: float
    """Of matrix products."""
    hbm_bytes: float
    """Bytes through memory: of the compiled program, or an estimate."""
    compiled: Compiled
    """The program; without a compiler its memory alone is known."""

    @property
    def peak(self) -> float:
        return self.compiled.peak

    @property
    def temporaries(self) -> float:
        """Activations, gradients and workspace."""
        return self.peak - sum(self.resident_bytes.values())

    @property
    def cost(self) -> Cost | None:
        """Sums over the kernels."""
        kernels = self.compiled.kernels
        return total(kernels, self.device) if kernels and self.device is not None else None

    @property
    def fits(self) -> bool:
        return self.device is None or self.peak <= usable_memory(self.device)

    @property
    def times(self) -> dict[str, float]:
        """Lower bounds of a step by what bounds it; empty for an unknown device."""
        if self.device is None:
            return {}
        times = {
            "compute": self.flops / self.device.flops,
            "memory": self.hbm_bytes / self.device.bandwidth,
            "network": self.compiled.network,
        }
        times |= {} if self.cost is None else {"kernels": self.cost.seconds}
        played = self.compiled.timeline
        if played is not None and played.waited:
            times["kernels and waits"] = played.kernels + played.waited
        return times

    @property
    def samples_per_second(self) -> float:
        """At most, over all devices; NaN for an unknown device."""
        return self.batch_size / max(self.times.values()) if self.times else math.nan


def make_plan(
    config: TrainConfig, topology: str | None = None, *, compiled: bool = True, recompute: bool = True
) -> Plan:
    """Plans the updates of a run.

    Args:
        config: of the run. Its weights and demonstrations are not needed.
        topology: as of `find_devices`.
        compiled: False leaves the compiler out: temporaries are estimated and traffic is unknown.
        recompute: as of `devices.compiler_options`.

    Raises:
        UserError: unknown topology, libtpu is missing, or the mesh or the batch does not fit it.
    """
    name, devices, device = find_devices(topology)
    # Devices that are not there have no other kernel.
    config = replace(config, {"policy.model.attention": "xla"})
    run, program, batch = build_program(config, devices)
    resident, mesh = resident_bytes(program, batch), run.mesh
    inputs = update_shapes(run, program, batch)
    work = flops.count(program.update, *inputs) / mesh.size
    held, temporaries = sum(resident.values()), estimate_temporaries(run, program)
    found = Compiled(held + temporaries, temporaries, dict.fromkeys(KINDS, 0.0), [], 0.0)
    stand_ins = estimates(devices, device)
    if compiled and not (stand_ins and mesh.size == 1):  # one device sends nothing
        lowered = program.update.lower(*inputs)  # pyright: ignore[reportFunctionMemberAccess]
        memory = {"peak": found.peak, "temporaries": temporaries} if stand_ins else {}
        found = compile_program(lowered, devices[0], device, triton=False, recompute=recompute)._replace(**memory)
    moved = sum(k.times * k.bytes for k in found.kernels) or _hbm_bytes(run, program, found.peak - held)
    return Plan(
        topology=name,
        device=device,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        resident_bytes=resident,
        estimated=stand_ins or not compiled,
        flops=work,
        hbm_bytes=moved,
        compiled=found,
    )


def estimate_temporaries(run: Run, program: Program) -> float:
    """Bytes of gradients, of what the backward pass keeps, and of one layer's workspace, on each device."""
    config, model, mesh = run.config, run.policy.model, run.mesh
    examples = config.batch_size / sharding.batch_ways(mesh) / config.grad_accum_steps
    copies = 1 if config.grad_accum_steps == 1 else 2  # of a microbatch, and their sum
    kept = kept_for_backward(run.policy, config.tune)
    everything = kept_for_backward(replace(run.policy, {"model.remat": "none"}), config.tune)
    layers = max(model.depth + model.vision.depth, 1)
    workspace = everything / layers if model.remat != "none" else 0.0
    gathered = 0.0
    if mesh.shape["fsdp"] > 1:  # two layers' weights, one in use and one on its way, and a layer's gradient
        weights = sum(x.size for x in jax.tree.leaves(program.shapes.weights)) / mesh.shape["tensor"]
        gathered = 3 * weights / layers * jnp.dtype(model.dtype).itemsize
    gradients = copies * placed_bytes(program.shapes.params)
    return gradients + examples * (kept + workspace) / mesh.shape["tensor"] + gathered


def kept_for_backward(policy: PolicyConfig, tune: TuneConfig) -> float:
    """Bytes per example that the backward pass finds stored under the model's rematerialisation policy.

    They are the outputs of the forward half of the gradient's program that grow with the batch.
    """
    many, few = (_residuals(policy.model, policy.objective, tune, size) for size in (8, 4))
    return (many - few) / 4


@functools.lru_cache(maxsize=64)
def _residuals(model: ModelConfig, config: ObjectiveConfig, tune: TuneConfig, size: int) -> float:
    objective = make_objective(config, model)
    weights = meta.unbox(jax.eval_shape(objective.network.init, jax.random.key(0)))
    trainable, frozen = partition(weights, frozen_names(tune, model, flat(weights)))

    def residuals(trainable, frozen, batch, *teacher):
        draws, count = objective.draw(batch, jax.random.key(0), 0)
        return jax.vjp(lambda t: objective.loss(combine(t, frozen), draws, count, *teacher)[0], trainable)[1]

    teacher = () if objective.teacher is None else (weights,)
    program = jax.make_jaxpr(residuals)(trainable, frozen, batch_shapes(model, config, size), *teacher).jaxpr
    inputs = set(program.invars)
    kept = {var for var in program.outvars if not hasattr(var, "val") and var not in inputs}  # literals have a value
    return float(sum(var.aval.size * var.aval.dtype.itemsize for var in kept))


def _hbm_bytes(run: Run, program: Program, temporaries: float) -> float:
    """Bytes through a device's memory in one update: an estimate that counts no activation twice.

    State and gradients are read and written once; the weights are read by the forward and the backward pass, and once
    more where a layer is computed again; what the backward pass finds was written and is read.
    """
    state, gradients = placed_bytes(program.shapes), placed_bytes(program.shapes.params)
    model = run.policy.model
    weights = sum(x.size for x in jax.tree.leaves(program.shapes.weights)) * jnp.dtype(model.dtype).itemsize
    passes = 2 if model.remat == "none" else 3
    activations = max(temporaries - gradients, 0.0)
    return 2 * (state + gradients) + passes * weights / run.mesh.shape["tensor"] + 2 * activations
