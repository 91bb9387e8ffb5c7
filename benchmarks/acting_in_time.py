"""Success and seams on the tabletop when the policy's answers are late, for every strategy of acting meanwhile.

Run: python benchmarks/acting_in_time.py runs/tabletop --trained runs/tabletop-delays

Time is simulated, so the figures do not depend on the machine. It writes acting_in_time.json, .csv and .png; cells that
the JSON has already are not run again.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from pi0_jax.evaluate.latency import STRATEGIES, Latency, simulate, summary
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.inference.policy import Policy

CONDITIONS = {
    "0 ms": Latency(),
    "100 ms": Latency(100),
    "300 ms": Latency(300),
    "600 ms": Latency(600),
    "300 ± 200 ms": Latency(300, jitter=200),
    "300 ± 200 ms, 10 % lost": Latency(300, jitter=200, drop=0.1, timeout=600),
}
UNITS = 1000
"""Millimetres per metre."""


def measure(run: Path, trained: Path | None, episodes: int, execute_steps: int, seed: int, path: Path) -> dict:
    """Figures by strategy and condition, written to `path` as they come in."""
    cells: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    simulator = get_simulator("tabletop")
    for name, (make, real_time) in STRATEGIES.items():
        source = trained if name == "trained" else run
        todo = [condition for condition in CONDITIONS if condition not in cells.get(name, {})]
        if source is None or not todo:
            continue
        policy = Policy.load(source, **({} if real_time is None else {"real_time": real_time}))
        for condition in tqdm(todo, desc=name):
            traces = simulate(policy, simulator, make(execute_steps), CONDITIONS[condition], episodes, seed)
            cells.setdefault(name, {})[condition] = summary(traces, simulator.fps)
            path.write_text(json.dumps(cells, indent=1))
    return cells


def rows(cells: dict) -> list[list[str]]:
    """Header and one row per strategy and condition."""
    header = ["strategy", "answers_after", "delay_steps", "success_percent", "success_low", "success_high", "seconds"]
    table = [[*header, "held_steps", "seam_mm", "inside_mm", "break_mm"]]
    for name, row in cells.items():
        for condition, f in row.items():
            percent = [f"{100 * f[key]:.1f}" for key in ("rate", "low", "high")]
            sizes = [f"{UNITS * f[key]:.1f}".replace("nan", "") for key in ("seam", "inside", "break")]
            if name == "synchronous":
                sizes[-1] = ""  # it stands still between chunks
            table.append(
                [name, condition, f"{f['delay']:.1f}", *percent, f"{f['seconds']:.2f}", f"{f['held']:.1f}", *sizes]
            )
    return table


def plot(cells: dict, path: Path) -> None:
    """Plots success, time and breaks over the latencies without jitter."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    steady = {name: latency.typical for name, latency in CONDITIONS.items() if not latency.jitter}
    panels = (("rate", 100, "success, %"), ("seconds", 1, "seconds to success"), ("break", UNITS, "break, mm"))
    for axes, (key, scale, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, (name, row) in enumerate(cells.items()):
            if name == "synchronous" and key == "break":
                continue
            values = [scale * row[condition][key] for condition in steady]
            axes.plot(list(steady.values()), values, f"C{number}o-", label=name)
        axes.set_xlabel("latency, ms (5 actions a second)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(90, 100.5)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(
    run: Annotated[Path, tyro.conf.Positional],
    trained: Path | None = None,
    episodes: int = 600,
    execute_steps: int = 4,
    seed: int = 0,
    output: Path = Path("runs/acting_in_time"),
) -> None:
    """Measures, and writes the figures.

    Args:
        run: a tabletop run.
        trained: the same, fine-tuned with --policy.objective.max-delay; None leaves that strategy out.
        episodes: episodes per strategy and condition.
        execute_steps: actions of a chunk after which the policy is queried for the next.
        seed: seed of layouts, noise and latencies.
        output: folder to write to.
    """
    output.mkdir(parents=True, exist_ok=True)
    cells = measure(run, trained, episodes, execute_steps, seed, output / "acting_in_time.json")
    with (output / "acting_in_time.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows(cells))
    plot(cells, output / "acting_in_time.png")


if __name__ == "__main__":
    tyro.cli(main)
