"""What programs of ours and of openpi cost on accelerators that are not there: their compilers say (`pi0_jax.plan`).

    python benchmarks/compiled.py                                       ours: sampling and training, π0 and π0.5
    python benchmarks/compiled.py --openpi CHECKOUT --openpi-python PYTHON --json compiled.json
    python benchmarks/compiled.py --programs sample --variants pi0 --devices h100 --forms folded plain --largest 10
    python benchmarks/compiled.py --json compiled.json --table          the rows of the file, nothing compiled

Needs XLA's compilers and no accelerator: pip install -e '.[cuda12,tpu]'. Sampling: ten Euler steps, batch 1, a prompt
of full length, bfloat16, on one device; forms are ways to write our sampler, of which `folded` is what policies run.
Training: the whole update, AdamW with a moving average in float32; forms are policies of rematerialisation. Models that
do not fit into one device are divided over eight (FSDP). openpi runs under this environment's JAX (jaxtyping 0.2.36 and
augmax in --openpi-python), its parameters in bfloat16 for sampling, as its policy server has them.

Columns: kernels that run, loops multiplied out; bytes through main memory; each kernel at its roofline by the data
sheet; with 2 µs per kernel to start it; TPUs: the compiler's own estimate of cycles. Compiling takes seconds by the
clock, and CPU seconds, tracing included, which other work changes less. Each row is a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from sides import markdown

Variant = Literal["pi0", "pi05"]
TOPOLOGIES = {
    "sample": {"h100": "h100:1", "rtx4090": "rtx4090:1", "v6e": "v6e:1x1"},
    "train": {"h100": "h100:1", "rtx4090": "rtx4090:8", "v6e": "v6e:2x4"},
}
"""What each device is planned as, if not with one of its kind."""
PER_DEVICE = {"h100": 8, "v6e": 4}
"""Examples per device of an update; else 1."""
ROBOTS = {3: "aloha", 2: "libero"}
"""A robot with so many cameras, for training."""
FORMS = {"sample": ("folded",), "train": ("full",)}
"""Of ours, by program; what is the default."""
STEPS = 10


@dataclass(frozen=True)
class Row:
    """One program."""

    side: Literal["ours", "openpi"]
    program: Literal["sample", "train"]
    variant: Variant
    device: str
    """Device, or topology (h100:8)."""
    cameras: int = 3
    form: str = ""

    @property
    def topology(self) -> str:
        if ":" in self.device:
            return self.device
        return TOPOLOGIES[self.program].get(self.device, f"{self.device}:1")

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.variant, self.program, self.topology, self.side, self.form)))


@dataclass
class Args:
    """Compiled programs of ours and of openpi, side by side."""

    programs: tuple[Literal["sample", "train"], ...] = ("sample", "train")
    variants: tuple[Variant, ...] = ("pi0", "pi05")
    devices: tuple[str, ...] = ("h100", "rtx4090", "v6e")
    """Devices, or topologies (h100:8), of `pi0 plan`."""
    forms: tuple[str, ...] = ()
    """Of ours. Sampling: folded, plain, int8, fp8. Training: full, gate_up, matmuls, none."""
    cameras: int = 3
    """Of ours; openpi computes three."""
    openpi: Path | None = None
    """openpi's checkout."""
    openpi_python: str = sys.executable
    """A Python that can import it, with this environment's JAX."""
    largest: int = 0
    """Print so many of each program's largest costs, with the lines of code that they come from."""
    within: tuple[str, ...] = ()
    """Lines of code, or parts of them (siglip.py): print what the kernels take that come from under each."""
    hlo: Path | None = None
    """Folder for the compiled programs' text."""
    json: Path | None = None
    """File of rows; those that are measured now replace their former selves."""
    table: bool = False
    """Print what the file has."""
    worker: str | None = None
    """Used by this script itself: the row that its process measures."""


def rows(args: Args) -> list[Row]:
    found = []
    for program in args.programs:
        forms = args.forms or FORMS[program]
        for variant in args.variants:
            for device in args.devices:
                if args.openpi is not None:
                    found.append(Row("openpi", program, variant, device))
                found += [Row("ours", program, variant, device, args.cameras, form) for form in forms]
    return found


def measure(row: Row, args: Args) -> dict[str, Any]:
    """One row, in this process."""
    from pi0_jax.plan.kernels import largest, total

    before = time.process_time()
    compiled, device, examples = PROGRAMS[row.side, row.program](row, args)
    cpu_seconds = time.process_time() - before
    if args.hlo is not None:
        args.hlo.mkdir(parents=True, exist_ok=True)
        (args.hlo / f"{row.name.replace(', ', '-').replace(':', '-')}.hlo").write_text(compiled.text)
    found: dict[str, Any] = {
        "compile_seconds": compiled.seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": compiled.peak,
        "examples": examples,
    }
    found |= {"temporary_bytes": compiled.temporaries, "sent_bytes": sum(compiled.comm_bytes.values())}
    found["fits"] = compiled.peak <= device.memory
    if compiled.kernels:
        cost = total(compiled.kernels, device)
        found |= cost._asdict() | {"total_seconds": max(cost.total_seconds, compiled.network)}
    found["within"] = {
        part: total([k for k in compiled.kernels if any(part in line for line in k.lines)], device)._asdict()
        for part in args.within
    }
    found["largest"] = [group._asdict() for group in largest(compiled.kernels, args.largest)]
    return found


def our_sampler(row: Row, args: Args):
    from pi0_jax.config import PI0, PI05, PolicyConfig
    from pi0_jax.plan.sample import make_sample_plan
    from pi0_jax.sampler import Euler

    policy = PolicyConfig(robot="aloha", model={"pi0": PI0, "pi05": PI05}[row.variant], sampler=Euler(STEPS))
    how: dict[str, Any] = {"folded": {}, "plain": {"folded": False}}.get(row.form, {"bits": row.form})
    plan = make_sample_plan(policy, row.topology, cameras=row.cameras, **how)
    return plan.compiled, plan.device, 1


def our_update(row: Row, args: Args):
    from pi0_jax.config import PI0, PI05, MeshConfig, PolicyConfig, TrainConfig
    from pi0_jax.config.replace import replace
    from pi0_jax.plan.compile import build_program, compile_program, update_shapes
    from pi0_jax.plan.devices import find_devices

    _, devices, device = find_devices(row.topology)
    batch = len(devices) * PER_DEVICE.get(row.device, 1)
    model = {"pi0": PI0, "pi05": PI05}[row.variant]
    policy = replace(PolicyConfig(robot=ROBOTS[row.cameras], model=model), {"model.remat": row.form})
    config = TrainConfig(policy=policy, mesh=MeshConfig(data=1, fsdp=-1), batch_size=batch)
    run, program, shapes = build_program(config, devices)
    lowered: Any = program.update
    return (
        compile_program(lowered.lower(*update_shapes(run, program, shapes)), devices[0], device, triton=False),
        device,
        batch,
    )


def openpi_sampler(row: Row, args: Args):
    import jax
    import numpy as np
    from openpi_jax import import_openpi, sampler_of_shapes

    from pi0_jax.plan.compile import compile_program
    from pi0_jax.plan.devices import find_devices
    from pi0_jax.plan.sample import place

    _, devices, device = find_devices(row.topology)
    sample, shapes = sampler_of_shapes(import_openpi(args.openpi), row.variant, STEPS)
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    # Its loop over the flow's times ends by a comparison of floats: the compiler does not know how often it runs.
    return (
        compile_program(jax.jit(sample).lower(*place(shapes, mesh)), devices[0], device, unknown_rounds=STEPS),
        device,
        1,
    )


def openpi_update(row: Row, args: Args):
    import jax
    from openpi_jax import import_for_training, lower_update

    from pi0_jax.plan.compile import compile_program
    from pi0_jax.plan.devices import find_devices

    _, devices, device = find_devices(row.topology)
    batch = len(devices) * PER_DEVICE.get(row.device, 1)
    mesh = jax.make_mesh(
        (1, len(devices)), ("batch", "fsdp"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    lowered = lower_update(import_for_training(args.openpi), row.variant, batch, mesh)
    # Its times are drawn by rejection: loops of a few rounds on a few numbers.
    return compile_program(lowered, devices[0], device, triton=False, unknown_rounds=1), device, batch


PROGRAMS = {
    ("ours", "sample"): our_sampler,
    ("ours", "train"): our_update,
    ("openpi", "sample"): openpi_sampler,
    ("openpi", "train"): openpi_update,
}


def in_a_process(row: Row, args: Args) -> dict[str, Any]:
    """Measures a row in a process of its own, because devices are counted once in each."""
    python = args.openpi_python if row.side == "openpi" else sys.executable
    command = [python, __file__, "--worker", json.dumps(dataclasses.asdict(row)), "--largest", str(args.largest)]
    command += [] if args.hlo is None else ["--hlo", str(args.hlo)]
    command += ["--within", *args.within] if args.within else []
    command += [] if args.openpi is None else ["--openpi", str(args.openpi)]
    # openpi's checks of types at run time refuse newer optax; nothing is to run on an accelerator of this machine.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAXTYPING_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        if done.returncode:
            errors.seek(0)
            return {"error": errors.read().strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def table(found: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    titles = ["program", "devices", "side", "compile s (CPU s)", "kernels", "GB", "TFLOP", "roofline ms"]
    titles += ["with launches ms", "M cycles", "peak GB", "per second"]
    lines = []
    for row in found:
        it = Row(**row["row"])
        side = f"{it.side} {it.form}".strip()
        line = [f"{it.variant} {it.program}", it.topology, side]
        if "kernels" not in row:
            lines.append([*line, row.get("error", f"does not fit: {row.get('peak_bytes', 0) / 1e9:.1f} GB")])
            continue
        tpu = bool(row["cycles"])
        line += [
            f"{row['compile_seconds']:.0f} ({row.get('cpu_seconds', math.nan):.0f})",
            row["kernels"],
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['flops'] / 1e12:.3f}",
        ]
        line += [f"{1e3 * row['seconds']:.2f}", "" if tpu else f"{1e3 * (row['seconds'] + row['launch_seconds']):.2f}"]
        line += [f"{row['cycles'] / 1e6:.1f}" if tpu else ""]
        line += [f"{row['peak_bytes'] / 1e9:.1f}" + ("" if row["fits"] else " (too much)")]
        lines.append([*line, f"{row['examples'] / row['total_seconds']:.1f}"])
    return markdown(titles, lines)


def costs(row: dict[str, Any]) -> str:
    """The parts and the largest costs of a row that were asked for."""
    parts = [(f"under {part}", cost) for part, cost in row.get("within", {}).items()]
    parts += [(f"{cost['kind']}: {cost['place']}", cost) for cost in row.get("largest", [])]
    lines = [
        f"  {1e3 * cost['seconds']:8.3f} ms {cost['kernels']:6} x {cost['bytes'] / 1e9:7.2f} GB "
        f"{cost['flops'] / 1e12:7.3f} TFLOP  {name}"
        for name, cost in parts
    ]
    return "\n".join(lines)


def main(args: Args) -> None:
    if args.worker is not None:
        answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
        print(json.dumps(measure(Row(**json.loads(args.worker)), args)), file=answers)
        return
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for row in [] if args.table else rows(args):
        print(row.name, flush=True)
        new = {"row": dataclasses.asdict(row), **in_a_process(row, args)}
        found = [old for old in found if old["row"] != new["row"]] + [new]
        print(table([new]).splitlines()[-1] + (f"\n{costs(new)}" if args.largest or args.within else ""), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
