"""Plans of full-size training on hardware that is not there, for docs/scaling.md:

    python benchmarks/plan.py plans.json            # every row that the file does not have yet; minutes each
    python benchmarks/plan.py plans.json --table    # the rows as Markdown

Rows for TPUs are compiled by libtpu (extra tpu), rows for GPUs by XLA (extra cuda12) or, without it, estimated.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from sides import markdown

from pi0_jax.config import PI0, PI05, MeshConfig, PolicyConfig, TrainConfig, TuneConfig

MODELS = {"π0": PI0, "π0.5": PI05}
PER_DEVICE = {"v5e": 4, "v5p": 16, "v6e": 8, "h100": 32}
"""Examples per device."""
CHIPS = ("v5p:1x1x1", "v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16")
FSDP = 64
"""Devices, at most, that the state is divided over; more are replicas. The image encoder's width, 1152, is 9 * 128."""


class Row(NamedTuple):
    model: str
    topology: str
    per_device: int
    trained: str = "full"

    @property
    def devices(self) -> int:
        return math.prod(int(n) for n in self.topology.partition(":")[2].split("x"))

    @property
    def batch_size(self) -> int:
        return self.per_device * self.devices


SLICES = [
    Row(model, topology, PER_DEVICE[topology.partition(":")[0]], trained)
    for topology in ("v5e:4x4", "v5p:2x2x4", "v6e:4x4", "h100:8")
    for trained in ("full", "lora")
    for model in MODELS
]
ALONE = [Row(model, "h100:1", 8, trained) for trained in ("full", "lora") for model in MODELS]
GROWTH = [Row("π0", topology, PER_DEVICE["v5p"]) for topology in CHIPS]
ROWS = list(dict.fromkeys([*SLICES, *ALONE, *GROWTH]))


def config(row: Row) -> TrainConfig:
    policy = PolicyConfig(model=MODELS[row.model], robot="aloha")
    return TrainConfig(
        policy=policy,
        tune=TuneConfig(recipe="lora" if row.trained == "lora" else "full"),
        mesh=MeshConfig(data=-1, fsdp=min(FSDP, row.devices)),
        batch_size=row.batch_size,
    )


def measure(row: Row) -> dict:
    """Makes one plan, in this process."""
    from pi0_jax.plan.cost import make_plan

    plan = make_plan(config(row), row.topology)
    sent = sum(plan.compiled.comm_bytes.values())
    return {
        **row._asdict(), "batch": plan.batch_size, "mesh": plan.mesh,
        "held": plan.resident_bytes, "temporaries": plan.temporaries, "estimated": plan.estimated, "peak": plan.peak,
        "fits": plan.fits, "flops": plan.flops, "sent": plan.compiled.comm_bytes, "sent_total": sent,
        "times": plan.times,
        "samples_per_second": plan.samples_per_second, "seconds_to_compile": plan.compiled.seconds,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    titles = ["model, trained", "devices", "batch", "state GB", "temporaries GB", "peak GB", "fits", "TFLOP", "sent GB"]
    titles += ["compute / memory / network ms", "samples/s at most"]
    lines = []
    for row in rows:
        state = sum(size for name, size in row["held"].items() if name != "batch") / 1e9
        times = " / ".join(f"{1e3 * row['times'][name]:.0f}" for name in ("compute", "memory", "network"))
        mark = " (est.)" if row["estimated"] else ""
        lines.append([
            f"{row['model']}, {row['trained']}", row["topology"], row["batch"], f"{state:.2f}",
            f"{row['temporaries'] / 1e9:.2f}{mark}",
            f"{row['peak'] / 1e9:.2f}", "yes" if row["fits"] else "no", f"{row['flops'] / 1e12:.0f}",
            f"{row['sent_total'] / 1e9:.1f}", times, f"{row['samples_per_second']:.0f}",
        ])  # fmt: skip
    return markdown(titles, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--row", type=int, help="print one row of ROWS as JSON; what this program calls itself with")
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(ROWS[options.row])))
        return
    rows = json.loads(options.path.read_text()) if options.path.exists() else []
    for number, row in enumerate(ROWS):
        if options.table or any(row == Row(*(r[name] for name in Row._fields)) for r in rows):
            continue
        print(*row, flush=True)
        # Devices are counted once per process.
        command = [sys.executable, __file__, str(options.path), "--row", str(number)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
        options.path.write_text(json.dumps(rows, indent=1))
    for title, wanted in (("slices", SLICES + ALONE), ("growth", GROWTH)):
        print(f"\n{title}\n")
        print(table([r for w in wanted for r in rows if w == Row(*(r[name] for name in Row._fields))]))


if __name__ == "__main__":
    main()
