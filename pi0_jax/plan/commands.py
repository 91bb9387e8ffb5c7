"""The command `pi0 plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pi0_jax.config import TrainConfig
from pi0_jax.errors import UserError
from pi0_jax.flops import GPUS, Device
from pi0_jax.plan.cost import Plan, make_plan
from pi0_jax.plan.devices import JAX_DEFAULT, JAX_SHARE, has_gpu_compiler, usable_memory
from pi0_jax.plan.fit import find_fitting
from pi0_jax.plan.kernels import LAUNCH_SECONDS, Cost, Kernel, largest
from pi0_jax.plan.largest_batch import PER_DEVICE, find_largest
from pi0_jax.plan.sample import SamplePlan, make_sample_plan
from pi0_jax.training.resolve import wide_enough


def plan(
    config: TrainConfig,
    topology: str | None,
    *,
    sample: bool = False,
    cameras: int | None = None,
    chunks: int = 1,
    largest_batch: bool = False,
) -> None:
    """Runs `pi0 plan`: prints the plan of a run, and where it does not fit, that of the nearest one that does.

    Args:
        config: of the run.
        topology: as of `devices.find_devices`.
        sample: plan a chunk of actions of its policy instead.
        cameras: how many of the model's cameras there are then; None: those of the robot.
        chunks: how many are computed together then.
        largest_batch: look for the largest batch that fits instead.

    Raises:
        UserError: see `plan.cost.make_plan`, `plan.sample.make_sample_plan` and `plan.largest_batch.find_largest`.
    """
    config = wide_enough(config)
    if sample:
        if topology is None:
            raise UserError("a chunk is planned for a device that is named: --topology h100:1, or v6e:2x2.")
        print(describe_sample(make_sample_plan(config.policy, topology, cameras=cameras, batch_size=chunks)))
        return
    if largest_batch:
        _largest_batch(config, topology)
        return
    first = make_plan(config, topology)
    print(describe(first), flush=True)
    _say_how_to_be_exact(first)
    if first.fits:
        return
    print("\nIt does not fit. Looking for the nearest settings that do ...", flush=True)
    found = find_fitting(config, first)
    if found is None:
        print("None of the settings that this command knows fits: take more devices.")
    else:
        print(f"\nThis fits: {found[0]}\n\n{describe(found[1])}")


def _say_how_to_be_exact(plan: Plan) -> None:
    """Prints what has to be installed for exact figures."""
    if plan.estimated and not has_gpu_compiler() and plan.topology.partition(":")[0] in GPUS:
        print(
            "\nTemporaries and bytes through memory are estimates. XLA's compiler for NVIDIA GPUs, which needs no GPU, "
            "makes them exact:\npip install -e '.[cuda12]'"
        )


def _largest_batch(config: TrainConfig, topology: str | None) -> None:
    """Prints each batch as it is tried, then the plan of the largest that fits and the flag that asks for it."""
    tried: list[Plan] = []

    def report(plan: Plan, memory: float) -> None:
        if not tried:
            print(f"{plan.topology}: batches of {PER_DEVICE} examples per device and microbatch, or a multiple of it")
        tried.append(plan)
        how = "estimated" if plan.estimated else f"compiled in {plan.compiled.seconds:.0f} s"
        verdict = "fits" if plan.peak <= memory else "does not fit"
        print(f"  batch {plan.batch_size:5}  {_size(plan.peak):>12} of {_size(memory)}  {how}: {verdict}", flush=True)

    found = find_largest(config, topology, report)
    if found is None:
        print(f"\nNot even {tried[-1].batch_size} examples fit. pi0 plan without --largest-batch says what does.")
        return
    print(f"\n{describe(found)}")
    _say_how_to_be_exact(found)
    print(f"\nThe largest that fits: --batch-size {found.batch_size}")


def describe(plan: Plan) -> str:
    """A plan as lines for people."""
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    source = "estimated" if plan.estimated else f"of the compiler, in {plan.compiled.seconds:.0f} s"
    rows = [(name, _size(size), "") for name, size in plan.resident_bytes.items()]
    rows.append(("temporaries", _size(plan.temporaries), source))
    rows.append(("peak", _size(plan.peak), "" if plan.device is None else _verdict(plan.peak, plan.device)))
    rows.append(("work", f"{plan.flops / 1e12:.4g} TFLOP", "matrix products, rematerialisation included"))
    rows.append(("through memory", _size(plan.hbm_bytes), "of the compiler" if plan.compiled.kernels else "estimated"))
    by_kind, played = plan.compiled.comm_bytes, plan.compiled.timeline
    printed = not math.isnan(sum(by_kind.values()))  # libtpu cannot print every program
    rows += [(kind, _size(sent), "sent") for kind, sent in by_kind.items() if printed and sent]
    if not printed and math.prod(plan.mesh.values()) > 1:
        rows.append(("sent", "not known", "the compiler cannot print this program"))
    lines = [f"{plan.topology}: {math.prod(plan.mesh.values())} devices, mesh {axes}, batch {plan.batch_size}", ""]
    lines += _rows(rows)
    if played is not None and plan.compiled.network:
        share = f"{played.beside / played.sent:.0%} of what is sent"
        lines += ["", f"{share} goes beside matrix products, in the order of the program"]
    if plan.times:
        times = ", ".join(
            f"{name} {_duration(seconds)}" for name, seconds in plan.times.items() if printed or name != "network"
        )
        lines += ["", f"a step takes at least {_duration(max(plan.times.values()))} ({times}),"]
        lines[-1] += f" which is at most {plan.samples_per_second:.0f} samples/s"
    if plan.cost is not None:
        lines += ["", *_kernels(plan.compiled.kernels, plan.cost)]
    return "\n".join(lines)


def describe_sample(plan: SamplePlan) -> str:
    """A plan of a chunk as lines for people."""
    many = "a chunk" if plan.batch_size == 1 else f"{plan.batch_size} chunks"
    head = f"{many} on one {plan.topology.partition(':')[0]}: {len(plan.cameras)} cameras, "
    head += f"a prompt of {plan.prompt_length} tokens"
    head += "" if plan.written is None else f", {plan.written} written one after another"
    rows = [
        ("weights", _size(plan.weights), ""),
        ("temporaries", _size(plan.compiled.temporaries), f"of the compiler, in {plan.compiled.seconds:.0f} s"),
        ("peak", _size(plan.compiled.peak), _verdict(plan.compiled.peak, plan.device)),
    ]
    lines = [head, ""]
    if not plan.compiled.kernels:
        return "\n".join([*lines, *_rows(rows)])
    cost = plan.cost
    rows.append(("work", f"{cost.flops / 1e12:.4g} TFLOP", "matrix products"))
    rows.append(("through memory", _size(cost.bytes), _duration(cost.memory_seconds)))
    return "\n".join([*lines, *_rows(rows), "", *_kernels(plan.compiled.kernels, cost)])


def _kernels(found: Sequence[Kernel], cost: Cost) -> list[str]:
    """What the kernels take, and the largest of them."""
    if cost.cycles:
        lines = [f"{cost.kernels} kernels take about {_duration(cost.seconds)}: {cost.cycles / 1e6:.4g} M cycles,"]
        lines[0] += " as the compiler estimates them"
    else:
        products, launched = _duration(cost.product_seconds), _duration(cost.seconds + cost.launch_seconds)
        lines = [
            f"{cost.kernels} kernels take at least {_duration(cost.seconds)} by the data sheet, those with matrix "
            f"products {products};",
            f"{launched} if each takes {LAUNCH_SECONDS * 1e6:.0f} µs to start, which is an assumption",
        ]
    lines += ["", f"  {'ms':>8} {'kernels':>7} {'GB':>7} {'TFLOP':>7}  the largest costs, and where they come from"]
    for it in largest(found):
        sizes = f"{1e3 * it.seconds:8.3f} {it.kernels:7} {it.bytes / 1e9:7.2f} {it.flops / 1e12:7.3f}"
        lines.append(f"  {sizes}  {it.kind}: {it.place}")
    return lines


def _verdict(peak: float, device: Device) -> str:
    """Whether so many bytes fit, and what JAX has to be told for it."""
    told = device in GPUS.values() and peak > JAX_DEFAULT * device.memory
    fits = f"fits with XLA_PYTHON_CLIENT_MEM_FRACTION={JAX_SHARE}" if told else "fits"
    return f"of {_size(device.memory)}: {fits if peak <= usable_memory(device) else 'DOES NOT FIT'}"


def _rows(rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"  {name:18} {value:>14}  {note}".rstrip() for name, value, note in rows]


def _size(size: int | float) -> str:
    return f"{size / 1e9:.3f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
