"""The figures of this machine's GPU or TPU beside what its compiler's programs predict: one table.

    python benchmarks/card.py --json card.json                  all rows: about half an hour on one H100
    python benchmarks/card.py --rows chunk --variants pi0       some of them
    python benchmarks/card.py --device h100 --predict-only      the predictions, for a card that is not there

Rows: a chunk of actions (full size, ten Euler steps, one, two and three cameras, a prompt of full length, bfloat16 and
fp8) and an update (batch 8, three cameras, all weights and LoRA), for π0 and π0.5, with random weights. Measured are
medians: of `latency.py --full` and `train.py --alone`, which this calls one after another. Predicted is what `pi0 plan`
says without the device: each kernel at its roofline by the data sheet, and with 2 µs to start each one. MFU is of
matrix products as the function asks for them, at the data sheet's peak. Rows that do not fit say so. Predictions for
GPUs take the extra cuda12, for TPUs tpu.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from sides import markdown

Variant = Literal["pi0", "pi05"]
BATCH = 8
"""Examples of an update."""


@dataclass
class Args:
    """Measured beside predicted, on this machine's accelerator."""

    rows: tuple[Literal["chunk", "update"], ...] = ("chunk", "update")
    variants: tuple[Variant, ...] = ("pi0", "pi05")
    cameras: tuple[int, ...] = (3, 2, 1)
    """Of chunks."""
    rounds: int = 100
    """Calls of each program of chunks; updates take a fifth."""
    device: str | None = None
    """The device's name in `pi0 plan --topology`; None: this machine's."""
    predict_only: bool = False
    """Measure nothing."""
    reduced: bool = False
    """Reduced sizes and no predictions, to try this out on CPUs."""
    json: Path | None = None
    """Where the figures go; they are written after each row."""
    worker: str | None = None
    """Used by this script itself: the row to predict."""


@dataclass(frozen=True)
class Row:
    """One program."""

    program: Literal["chunk", "update"]
    variant: Variant
    cameras: int
    how: Literal["bfloat16", "fp8", "full", "lora"]

    @property
    def name(self) -> str:
        return f"{self.variant} {self.program}, {self.cameras} cameras, {self.how}"


def rows_of(args: Args) -> list[Row]:
    chunks = [
        Row("chunk", variant, cameras, how)
        for variant in args.variants
        for how in ("bfloat16", "fp8")
        for cameras in args.cameras
    ]
    updates = [Row("update", variant, 3, how) for variant in args.variants for how in ("full", "lora")]
    return [row for row in [*chunks, *updates] if row.program in args.rows]


def predict(row: Row, device: str) -> dict[str, Any]:
    """What the compiler's program takes, in this process, where nothing runs."""
    from pi0_jax.config import PI0, PI05, PolicyConfig, TrainConfig, TuneConfig
    from pi0_jax.plan.cost import make_plan
    from pi0_jax.plan.sample import make_sample_plan

    topology = f"{device}:1x1" if device.startswith("v") else f"{device}:1"
    policy = PolicyConfig(robot="aloha", model={"pi0": PI0, "pi05": PI05}[row.variant])
    if row.program == "chunk":
        bits = "fp8" if row.how == "fp8" else None
        plan: Any = make_sample_plan(policy, topology, cameras=row.cameras, bits=bits)
        peak = plan.compiled.peak
    else:
        recipe: Any = row.how
        plan = make_plan(TrainConfig(policy=policy, tune=TuneConfig(recipe=recipe), batch_size=BATCH), topology)
        peak = plan.peak
    found = {"peak_bytes": peak, "memory": plan.device.memory, "fits": plan.fits, "peak_flops": plan.device.flops}
    return found if plan.cost is None else found | plan.cost._asdict() | {"with_launches": plan.cost.total_seconds}


def measure(row: Row, args: Args, folder: Path) -> dict[str, Any]:
    """Seconds of the program by one of the other scripts."""
    found = folder / "found.json"
    if row.program == "chunk":
        command = ["latency.py", "--variants", row.variant, "--cameras", str(row.cameras), "--prompt-tokens", "0"]
        command += ["--rounds", str(args.rounds)] + ([] if args.reduced else ["--full"])
        command += ["--bits", "fp8"] if row.how == "fp8" else []
    else:
        case = f"{row.variant}, 3 cameras, batch {BATCH}, full" + (", lora" if row.how == "lora" else "")
        command = ["train.py", "--alone", "--only", case, "--rounds", str(max(args.rounds // 5, 3))]
        command += ["--size", "reduced" if args.reduced else "full"]
    script, *options = command
    command = [sys.executable, str(Path(__file__).with_name(script)), *options, "--json", str(found)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode or not found.exists():
        return failure(done)
    kept = json.loads(found.read_text())
    if row.program == "chunk":
        return {"seconds": kept["rows"][0]["ours"]["p50_ms"] / 1000, "p95": kept["rows"][0]["ours"]["p95_ms"] / 1000}
    if not kept or "error" in kept[0]["ours"]:
        return {"error": kept[0]["ours"]["error"] if kept else f"no case is named {case!r}"}
    return kept[0]["ours"] | {"seconds": statistics.median(kept[0]["ours"]["seconds"])}


def failure(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Last words of a process."""
    return {"error": (done.stderr.strip().splitlines() or ["no figures"])[-1][:300]}


def in_a_process(row: Row, device: str) -> dict[str, Any]:
    """A prediction without the accelerator, whose memory is left to what is measured."""
    command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(row)), "--device", device]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return failure(done)
    return json.loads(done.stdout.splitlines()[-1])


def this_device() -> str:
    """What `pi0 plan` calls this machine's device, asked in a process that then leaves it alone."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    from pi0_jax.flops import device_name

    kind = done.stdout.strip()
    name = device_name(kind)
    if name is None:
        raise SystemExit(
            f"this machine's device is {kind!r}, whose data sheet pi0_jax/flops.py does not have; --device"
        )
    return name


def line(row: Row, predicted: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """Cells of the table."""
    low, high = (predicted.get(key, 0.0) for key in ("seconds", "with_launches"))
    seconds = measured.get("seconds")
    per_call = 1 if row.program == "chunk" else BATCH
    cells = [row.name, f"{1000 * low:.1f} to {1000 * high:.1f}" if low else predicted.get("error", "")]
    if seconds is None:
        return [*cells, measured.get("error", ""), "", "", ""]
    against = f"{seconds / ((low + high) / 2) - 1:+.0%}" if low else ""
    work = predicted.get("flops") or measured.get("flops")
    mfu = f"{work / seconds / predicted['peak_flops']:.0%}" if work and "peak_flops" in predicted else ""
    return [*cells, f"{1000 * seconds:.1f}", against, f"{per_call / seconds:.1f}", mfu]


TITLES = ["program", "predicted ms", "measured ms", "to the middle", "per second", "MFU"]


def main(args: Args) -> None:
    if args.worker is not None:
        assert args.device is not None
        print(json.dumps(predict(Row(**json.loads(args.worker)), args.device)))
        return
    device = "" if args.reduced else args.device or this_device()
    result: dict[str, Any] = {"machine": platform.machine(), "device": device, "batch": BATCH, "rows": []}
    lines = []
    for row in rows_of(args):
        print(row.name, flush=True)
        predicted = in_a_process(row, device) if device else {}
        measured: dict[str, Any] = {}
        if predicted.get("fits") is False:
            needs, has = predicted["peak_bytes"] / 1e9, predicted["memory"] / 1e9
            measured = {"error": f"does not fit: {needs:.1f} of {has:.1f} GB"}
        elif not args.predict_only:
            with tempfile.TemporaryDirectory() as folder:
                measured = measure(row, args, Path(folder))
        result["rows"].append({"row": dataclasses.asdict(row), "predicted": predicted, "measured": measured})
        lines.append(line(row, predicted, measured))
        print(markdown(TITLES, lines[-1:]), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{device or 'reduced sizes'}\n{markdown(TITLES, lines)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
