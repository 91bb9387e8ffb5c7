"""What a run would take, without the hardware: memory, work, traffic and time of one update, per device.

For TPUs the real update is compiled by libtpu for a topology that need not be there: its memory is what the compiler
allotted and its traffic what the program sends. For GPUs no compiler is at hand, so the same update is compiled for as
many CPU devices: what each device holds and which collectives there are is the same program's, but activations are
estimated from what the backward pass keeps (`kept_for_backward`), because a CPU's temporaries are not a GPU's. Nothing
is ever allocated: all of it comes from shapes.

Times are bounds: the work at the data sheet's peak, what has to pass through memory, and what has to be sent, each as
if the others cost nothing. A step takes at least the largest of the three.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from jax.experimental import topologies
from jax.sharding import Mesh

from pi0_jax import flops, pi0
from pi0_jax.batch import Batch
from pi0_jax.config import MeshConfig, ModelConfig, OptimConfig, TrainConfig, TuneConfig
from pi0_jax.data.normalization import NormStats
from pi0_jax.data.robots import get_robot
from pi0_jax.model.heads import make_network
from pi0_jax.plan.hlo_collectives import KINDS, traffic
from pi0_jax.training import sharding
from pi0_jax.training.inputs import trained_model
from pi0_jax.training.partition import divide, flat, frozen_names, unite, with_adapters
from pi0_jax.training.program import Program, build

GIB = 2**30
REMATS = ("none", "matmuls", "gate_up", "full")
"""From the one that keeps most."""


class Device(NamedTuple):
    """What the maker's data sheet says of one device."""

    memory: float
    """Bytes that a program may use."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s that it can send to its neighbours, over all links."""
    node: int = 0
    """Devices that `link` connects; 0: all."""
    network: float = 0.0
    """Bytes/s that each device can send to other nodes."""


TPUS = {
    "v4": Device(30.75 * GIB, 275e12, 1228e9, 300e9),
    "v5e": Device(15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Device(95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Device(31.25 * GIB, 918e12, 1640e9, 400e9),
}
"""By the name that libtpu gives a topology. Links: half of the bidirectional figure of cloud.google.com/tpu/docs."""
GPUS = {
    "a100": Device(79 * GIB, 312e12, 2039e9, 300e9, 8, 25e9),
    "h100": Device(79 * GIB, 989e12, 3350e9, 450e9, 8, 50e9),
    "h200": Device(139 * GIB, 989e12, 4800e9, 450e9, 8, 50e9),
    "l40s": Device(44 * GIB, 362e12, 864e9, 32e9, 8, 25e9),
    "rtx4090": Device(23.5 * GIB, 165e12, 1008e9, 32e9, 8, 12.5e9),
}
"""SXM where there is a choice; nodes of eight, with one 200 Gb/s (A100) or 400 Gb/s (Hopper) adapter a device."""


class Plan(NamedTuple):
    """One update on one device of many. Sizes in bytes, times in seconds."""

    topology: str
    device: Device | None
    """None where its data sheet is not known."""
    mesh: dict[str, int]
    batch_size: int
    held: dict[str, int]
    """What stays from step to step: `parameters`, `optimizer`, `average`, and the `batch`."""
    temporaries: float
    """Activations, gradients and workspace."""
    estimated: bool
    """Whether `temporaries` is an estimate; otherwise it is the compiler's."""
    peak: float
    flops: float
    """Of matrix products."""
    passed: float
    """Bytes through memory; an estimate."""
    sent: dict[str, float]
    """By kind of collective."""
    seconds_to_compile: float

    @property
    def fits(self) -> bool:
        return self.device is None or self.peak <= self.device.memory

    @property
    def times(self) -> dict[str, float]:
        """Lower bounds of a step by what bounds it; empty for a device that is not known."""
        if self.device is None:
            return {}
        devices = math.prod(self.mesh.values())
        link = self.device.link if not self.device.node or devices <= self.device.node else self.device.network
        return {
            "compute": self.flops / self.device.flops,
            "memory": self.passed / self.device.bandwidth,
            "network": sum(self.sent.values()) / link,
        }

    @property
    def samples_per_second(self) -> float:
        """At most, over all devices; NaN for a device that is not known."""
        return self.batch_size / max(self.times.values()) if self.times else math.nan


def make_plan(config: TrainConfig, topology: str | None = None, *, compiled: bool = True) -> Plan:
    """Plans the updates of a run.

    Args:
        config: of the run. Its weights and demonstrations are not needed.
        topology: "v5e:4x8", "h100:8"; None: the devices that are here.
        compiled: False leaves the compiler out: temporaries are estimated and traffic is not known.

    Raises:
        ValueError: unknown topology, libtpu is missing, or the mesh or the batch does not fit it.
    """
    name, devices, device = find_devices(topology)
    config = _with_model(config, attention="xla")  # planned on CPU devices, where there is no other kernel
    mesh = sharding.make_mesh(config.mesh, devices)
    program, batch = _program(config, mesh)
    held = _held(program, batch)
    work = flops.count(program.update, jax.ShapeDtypeStruct((), np.uint32), program.shapes, batch) / mesh.size
    temporaries, estimated = estimate_temporaries(config, mesh, program), True
    peak, seconds = sum(held.values()) + temporaries, 0.0
    sent: dict[str, float] = {kind: 0.0 for kind in KINDS}
    on_gpus = name.partition(":")[0] in GPUS
    if compiled and not (on_gpus and mesh.size == 1):  # one device sends nothing
        then = time.monotonic()
        used, sent = _compile(program, batch)
        seconds = time.monotonic() - then
        if not on_gpus:
            peak, temporaries, estimated = used, used - sum(held.values()), False
    passed = _passed(config, mesh, program, temporaries)
    return Plan(
        name,
        device,
        dict(mesh.shape),
        config.batch_size,
        held,
        temporaries,
        estimated,
        peak,
        work,
        passed,
        sent,
        seconds,
    )


def find_devices(topology: str | None) -> tuple[str, list[Any], Device | None]:
    """Name, devices to compile for, and data sheet of a topology; see `make_plan`."""
    if topology is None:
        devices = jax.devices()
        kind = devices[0].device_kind
        aliases = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4"}
        sheet = TPUS.get(aliases.get(kind, "")) or next((d for n, d in GPUS.items() if n.upper() in kind), None)
        return f"{kind}:{len(devices)}", devices, sheet
    name, _, shape = topology.lower().partition(":")
    if name not in TPUS | GPUS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(
            f"unknown topology {topology!r}. It is a device and how many: {', '.join(TPUS)} with their shape (v5e:4x8, "
            f"v5p:2x2x4), {', '.join(GPUS)} with their number (h100:8)."
        )
    if name in TPUS:
        return topology, _tpus(topology), TPUS[name]
    return topology, _cpus(math.prod(int(n) for n in shape.split("x"))), GPUS[name]


def _tpus(topology: str) -> list[Any]:
    # libtpu looks for TPUs, and asks Google's metadata server about them, unless it is told that there are none.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    chips = [int(n) for n in topology.partition(":")[2].split("x")]
    options: dict[str, Any] = {"chips_per_host_bounds": [*chips, 1, 1][:3]} if math.prod(chips) < 4 else {}
    if topology.startswith("v4:"):  # a device is a chip, as on the hardware, and not a core
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except Exception as error:  # whatever libtpu raises
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                f"a plan for {topology} is compiled by libtpu, which is not installed: pip install 'pi0_jax[tpu]'. It "
                "needs no TPU. Plans for GPUs, such as h100:8, need nothing."
            ) from error
        raise ValueError(
            f"no topology {topology}: {str(error).splitlines()[0]} Shapes that exist: 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, "
            "16x16 of v5e and v6e, and of v4 and v5p three numbers, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4 and so on."
        ) from error


def _cpus(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # devices have been asked for before
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"planning for {count} GPUs takes as many CPU devices; this process has {len(devices)}.")
    return devices[:count]


def _program(config: TrainConfig, mesh: Mesh) -> tuple[Program, Batch]:
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


def _held(program: Program, batch: Batch) -> dict[str, int]:
    state = program.shapes
    parts = {"parameters": state.params, "optimizer": (state.step, state.opt_state), "average": state.ema}
    parts |= {} if state.frozen is None else {"frozen": state.frozen}
    return {name: _bytes_per_device(part) for name, part in (parts | {"batch": batch}).items()}


def _bytes_per_device(shapes) -> int:
    return sharding.bytes_per_device(shapes, jax.tree.map(lambda x: x.sharding, shapes))


def _compile(program: Program, batch: Batch) -> tuple[float, dict[str, float]]:
    """Compiles the update: bytes that it needs, and bytes that it sends (none where it does not fit)."""
    lowered = program.update.lower(jax.ShapeDtypeStruct((), np.uint32), program.shapes, batch)  # pyright: ignore
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", str(error))
        if used is None:
            raise
        return float(used[1]) * {"K": 2**10, "M": 2**20, "G": GIB}[used[2]], {kind: math.nan for kind in KINDS}
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes, traffic(compiled.as_text())


def estimate_temporaries(config: TrainConfig, mesh: Mesh, program: Program) -> float:
    """Bytes of gradients, of what the backward pass keeps, and of one layer's workspace, on each device."""
    model = config.policy.model
    samples = config.batch_size / sharding.batch_ways(mesh) / config.parts
    gradients = _gradient_bytes(program) * (1 if config.parts == 1 else 2)  # a part's, and their sum
    kept = kept_for_backward(config)
    everything = kept_for_backward(_with_model(config, remat="none"))
    layers = max(model.depth + model.vision.depth, 1)
    workspace = everything / layers if model.remat != "none" else 0.0
    gathered = 0.0
    if mesh.shape["fsdp"] > 1:  # two layers' weights, one in use and one on its way, and a layer's gradient
        weights = sum(x.size for x in jax.tree.leaves(program.shapes.weights)) / mesh.shape["tensor"]
        gathered = 3 * weights / layers * jnp.dtype(model.dtype).itemsize
    return gradients + samples * (kept + workspace) / mesh.shape["tensor"] + gathered


def _gradient_bytes(program: Program) -> int:
    return _bytes_per_device(program.shapes.params)


def _with_model(config: TrainConfig, **changes) -> TrainConfig:
    model = dataclasses.replace(config.policy.model, **changes)
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, model=model))


def kept_for_backward(config: TrainConfig) -> float:
    """Bytes an example that the backward pass finds stored under the model's rematerialisation policy.

    They are the outputs of the forward half of the gradient's program that grow with the batch.
    """
    config = with_adapters(config)
    model = trained_model(config)
    return _kept(model, config.flow, config.tune, 2) - _kept(model, config.flow, config.tune, 1)


@functools.lru_cache(maxsize=64)
def _kept(model: ModelConfig, flow, tune: TuneConfig, size: int) -> float:
    network = make_network(model)
    weights = meta.unbox(jax.eval_shape(functools.partial(pi0.init_params, network), jax.random.key(0)))
    trained, frozen = divide(weights, frozen_names(tune, model, flat(weights)))

    def residuals(trained, frozen, batch):
        def loss(trained):
            return pi0.loss(network, unite(trained, frozen), batch, jax.random.key(0), flow)[0]

        return jax.vjp(loss, trained)[1]

    program = jax.make_jaxpr(residuals)(trained, frozen, batch_shapes(model, size)).jaxpr
    inputs = set(program.invars)
    kept = {var for var in program.outvars if not hasattr(var, "val") and var not in inputs}  # literals have a value
    return float(sum(var.aval.size * var.aval.dtype.itemsize for var in kept))


def _passed(config: TrainConfig, mesh: Mesh, program: Program, temporaries: float) -> float:
    """Bytes through a device's memory in one update: an estimate that counts no activation twice.

    State and gradients are read and written once; the weights are read by the forward and the backward pass, and once
    more where a layer is computed again; what the backward pass finds was written and is read.
    """
    state, gradients = _bytes_per_device(program.shapes), _gradient_bytes(program)
    model = config.policy.model
    weights = sum(x.size for x in jax.tree.leaves(program.shapes.weights)) * jnp.dtype(model.dtype).itemsize
    passes = 2 if model.remat == "none" else 3
    return 2 * (state + gradients) + passes * weights / mesh.shape["tensor"] + 2 * max(temporaries - gradients, 0.0)


def alternatives(
    config: TrainConfig, mesh: Mesh, needs: Callable[[TrainConfig], float]
) -> Iterator[tuple[str, TrainConfig]]:
    """Ways to need less memory, each on top of those before it, with the flags that ask for them.

    First what changes no number: dividing the state, computing activations again, or a batch in parts. Then what is
    held for each parameter: an average in bfloat16, 8-bit moments, no average. At last, in place of those, adapters
    alone. Parts are given up again where the sum of their gradients takes more than they save.

    Args:
        config: of the run.
        mesh: of the run.
        needs: bytes on each device under a configuration.
    """
    flags: dict[str, str] = {}

    def with_flags(values: dict[str, str], config: TrainConfig) -> tuple[str, TrainConfig]:
        flags.update(values)
        return " ".join(f"{flag} {value}" for flag, value in flags.items()), config

    tensor, ways = mesh.shape["tensor"], sharding.batch_ways(mesh)
    if mesh.shape["data"] > 1 and config.mesh.slices == 1:
        config = dataclasses.replace(config, mesh=MeshConfig(1, -1, tensor))
        values = {"--mesh.data": "1", "--mesh.fsdp": "-1"} | ({"--mesh.tensor": str(tensor)} if tensor > 1 else {})
        yield with_flags(values, config)
    for policy in REMATS[REMATS.index(config.policy.model.remat) + 1 :]:
        config = _with_model(config, remat=policy)
        yield with_flags({"--policy.model.remat": policy}, config)
    whole = config
    while config.batch_size % (2 * ways * config.parts) == 0:
        config = dataclasses.replace(config, parts=2 * config.parts)
        yield with_flags({"--parts": str(config.parts)}, config)
    if config.parts > whole.parts and needs(config) > needs(whole):
        config = whole
        del flags["--parts"]
    same_numbers = dict(flags), config
    for changes in _smaller_optimizers(config.optim):
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))
        yield with_flags({f"--optim.{name.replace('_', '-')}": str(value) for name, value in changes.items()}, config)
    if config.tune.recipe != "lora":
        flags, config = same_numbers
        config = dataclasses.replace(config, tune=dataclasses.replace(config.tune, recipe="lora"))
        yield with_flags({"--tune.recipe": "lora"}, config)


def _smaller_optimizers(optim: OptimConfig) -> Iterator[dict[str, Any]]:
    """Changes of the optimizer's settings, each of which holds less than those before it."""
    if optim.ema_decay is not None and optim.ema_dtype != "bfloat16":
        yield {"ema_dtype": "bfloat16"}
    if optim.name == "adamw":
        yield {"name": "adamw_8bit"}
    if optim.ema_decay is not None:
        yield {"ema_decay": None}


def find_fitting(config: TrainConfig, plan: Plan) -> tuple[str, Plan] | None:
    """The first of `alternatives` that fits: chosen by the estimate, scaled to what the compiler said, and compiled.

    Args:
        config: what does not fit.
        plan: of it.

    Returns:
        Its flags and its plan; None where none of them fits.
    """
    assert plan.device is not None
    devices = find_devices(plan.topology)[1]
    mesh = sharding.make_mesh(config.mesh, devices)
    scale = plan.temporaries / estimate_temporaries(config, mesh, _program(config, mesh)[0])

    def guess(other: TrainConfig) -> float:
        mesh = sharding.make_mesh(other.mesh, devices)
        program, batch = _program(other, mesh)
        return sum(_held(program, batch).values()) + scale * estimate_temporaries(other, mesh, program)

    for flags, other in alternatives(config, mesh, guess):
        if guess(other) <= plan.device.memory and (checked := make_plan(other, plan.topology)).fits:
            return flags, checked
    return None


def describe(plan: Plan) -> str:
    """A plan as lines for people."""
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    source = "estimated" if plan.estimated else f"of the compiler, in {plan.seconds_to_compile:.0f} s"
    rows = [(name, _size(size), "") for name, size in plan.held.items()]
    rows.append(("temporaries", _size(plan.temporaries), source))
    room = "" if plan.device is None else f"of {_size(plan.device.memory)}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    rows.append(("peak", _size(plan.peak), room))
    rows.append(("work", f"{plan.flops / 1e12:.4g} TFLOP", "matrix products, rematerialisation included"))
    rows.append(("through memory", _size(plan.passed), "estimated"))
    rows += [(kind, _size(sent), "sent") for kind, sent in plan.sent.items() if sent]
    lines = [f"{plan.topology}: {math.prod(plan.mesh.values())} devices, mesh {axes}, batch {plan.batch_size}", ""]
    lines += [f"  {name:18} {value:>14}  {note}".rstrip() for name, value, note in rows]
    if plan.times:
        times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in plan.times.items())
        lines += ["", f"a step takes at least {_duration(max(plan.times.values()))} ({times}),"]
        lines[-1] += f" which is at most {plan.samples_per_second:.0f} samples/s"
    return "\n".join(lines)


def _size(size: float) -> str:
    return f"{size / 1e9:.3f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
