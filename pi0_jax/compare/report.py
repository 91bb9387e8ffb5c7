"""The page of a comparison, and its figures as JSON: made from whatever cells are done."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from pi0_jax.compare.cells import CELL, CONTROL_STEPS, HORIZONS, cells, control_latencies, folder
from pi0_jax.config import CompareConfig
from pi0_jax.evaluate.report import GREY, figure_svg, new_figure, picture_tag
from pi0_jax.evaluate.rollout import wilson

RATES = (50, 100, 500)
"""Control rates, Hz."""
SHARE = 0.95
"""Of its own best success that a policy has to reach to count as good."""


class Interval(NamedTuple):
    """A mean, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def over_seeds(values: list[float], low: float = -np.inf, high: float = np.inf) -> Interval:
    """Mean over training seeds with Student's 95 % interval, cut to what is possible; one seed has no interval."""
    array = np.array(values, float)
    half = 0.0
    if len(array) > 1:
        half = float(student.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    mean = float(array.mean())
    return Interval(mean, max(low, mean - half), min(high, mean + half))


def write_comparison(config: CompareConfig) -> Path:
    """Writes `compare.json`, `compare.html` and its plots as SVG files into the comparison's folder.

    Returns:
        The page.

    Raises:
        ValueError: no cell is done yet.
    """
    done = [
        json.loads((folder(config, seed, name) / CELL).read_text())
        for seed, name in cells(config)
        if name in config.contenders and (folder(config, seed, name) / CELL).is_file()
    ]
    if not done:
        raise ValueError(f"nothing to compare in {config.run_dir} yet.")
    root = Path(config.run_dir)
    control = root / "control.json"
    first = next(name for name, c in config.contenders.items() if c.model.prediction == "velocity")
    if not control.is_file():
        control.write_text(
            json.dumps(control_latencies(config, folder(config, config.seeds[0], first)), indent=1) + "\n"
        )
    figures = summarize(done) | {
        "control_latency_seconds": json.loads(control.read_text()),
        "settings": {
            "seeds": list(config.seeds),
            "backbone_steps": config.backbone_steps,
            "steps": config.train.num_steps,
            "batch": config.train.batch_size,
            "episodes": config.episodes,
            "environment": config.env,
            "device": done[0]["device"],
            "jax": done[0]["jax"],
        },
    }
    (root / "compare.json").write_text(json.dumps(figures, indent=1) + "\n")
    pictures = {
        "success": _curves(figures["policies"], "success", "success rate"),
        "jitter": _bars(figures["policies"]),
        "error": _curves(figures["policies"], "error", "RMS error, robot units"),
        "paths": _paths(done),
    }
    for name, picture in pictures.items():
        (root / f"{name}.svg").write_bytes(picture)
    path = root / "compare.html"
    path.write_text(_page(figures, pictures), encoding="utf-8")
    return path


def summarize(done: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all cells, by policy (contender and solver) and number of network evaluations."""
    policies: dict[str, Any] = {}
    for label, (name, solver) in _labels(done).items():
        mine = [cell for cell in done if cell["name"] == name]
        rows = [[row for row in cell["rows"] if row["solver"] == solver] for cell in mine]
        counts = [row["evaluations"] for row in rows[0]]
        by_count = {str(n): _at(rows, n) for n in counts}
        enough = [_enough(r) for r in rows]
        best = max(counts, key=lambda n: (by_count[str(n)]["success"].mean, -n))
        policies[label] = {
            "evaluations": by_count,
            "best": {"evaluations": best, **{k: by_count[str(best)][k] for k in ("success", "pooled", "jitter")}},
            "evaluations_for_95_percent_of_best": {"median": float(np.median(enough)), "by_seed": enough},
            "error_floor": over_seeds([min(row["error_floor"] for row in r) for r in rows], low=0.0),
            "straightness": _maybe([cell["straightness"][solver] for cell in mine if solver in cell["straightness"]]),
            "parameters": mine[0]["parameters"],
            "training_seconds": float(np.mean([cell["training_seconds"] for cell in mine])),
        }
    return {"policies": policies}


def _labels(done: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Label to contender and solver, in the order of the cells; the solver is named where there are several."""
    labels = {}
    for cell in done:
        solvers = list(dict.fromkeys(row["solver"] for row in cell["rows"]))
        for solver in solvers:
            labels[f"{cell['name']} ({solver.upper()})" if len(solvers) > 1 else cell["name"]] = (cell["name"], solver)
    return labels


def _at(rows: list[list[dict[str, Any]]], count: int) -> dict[str, Any]:
    """What all seeds measured at one number of evaluations."""
    chosen = [row for seed in rows for row in seed if row["evaluations"] == count]
    won, total = sum(row["successes"] for row in chosen), sum(row["episodes"] for row in chosen)
    return {
        "success": over_seeds([row["successes"] / row["episodes"] for row in chosen], 0.0, 1.0),
        "pooled": Interval(won / total, *wilson(won, total)),
        "error": over_seeds([row["error"] for row in chosen], low=0.0),
        "jitter": over_seeds([row["jitter"] for row in chosen], low=0.0),
        "latency_ms": over_seeds([row["latency_ms"] for row in chosen], low=0.0),
    }


def _enough(rows: list[dict[str, Any]]) -> int:
    """Fewest evaluations with at least 95 % of the best success of one seed."""
    rates = {row["evaluations"]: row["successes"] / row["episodes"] for row in rows}
    return min(n for n, rate in rates.items() if rate >= SHARE * max(rates.values()))


def _maybe(values: list[float]) -> Interval | None:
    return over_seeds(values, low=0.0) if values else None


def _page(figures: dict[str, Any], pictures: dict[str, bytes]) -> str:
    policies, settings = figures["policies"], figures["settings"]
    seeds = len(settings["seeds"])
    spread = f"over {seeds} training seeds" if seeds > 1 else "one training seed: no interval over seeds"
    sections = [
        ("How many evaluations does each need?", pictures["success"], _main_table(policies)),
        (
            "Who jitters, who is precise?",
            pictures["jitter"],
            "Jitter: mean squared third difference of the executed actions, at the number of evaluations with the best "
            "success. Error floor: the tenth percentile over held-out frames of the root-mean-square error to the "
            "expert, at the best number of evaluations.",
        ),
        ("Error of a chunk to the expert", pictures["error"], ""),
        ("What straightening buys at one evaluation", None, _one_step_table(policies)),
        (
            "From noise to an action",
            pictures["paths"],
            "The first coordinate of a chunk's first action for one observation and 64 draws of noise, in the model's "
            "units, over 50 steps from noise (left) to action (right).",
        ),
        ("High-rate control", None, _control_table(figures["control_latency_seconds"])),
        ("All figures", None, _full_table(policies)),
    ]
    body = "\n".join(
        f"<section><h2>{title}</h2>{'' if picture is None else picture_tag(picture, title)}<div>{text}</div></section>"
        for title, picture, text in sections
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Flow matching, diffusion and bins compared</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem }}
img {{ width: 100%; max-width: 60rem }} table {{ border-collapse: collapse; font-size: .9rem; margin: .6rem 0 }}
td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e5e7eb }}
footer {{ margin-top: 3rem; font-size: .85rem; color: {GREY} }}
</style>
<h1>Flow matching, diffusion and discretised actions, on one backbone</h1>
<p>Every policy starts from the same backbone ({settings["backbone_steps"]} steps of plain regression) and
is trained for {settings["steps"]} steps of batch {settings["batch"]} with the same data and optimizer;
{settings["episodes"]} fresh episodes for each figure. Intervals are 95 %, {spread}.</p>
{body}
<footer>{html.escape(settings["environment"])}, seeds {", ".join(map(str, settings["seeds"]))},
{html.escape(settings["device"])}, JAX {settings["jax"]}. Made by pi0_jax; the figures are in
<code>compare.json</code>.</footer></html>
"""


def _rate(value: Interval) -> str:
    spread = "" if value.low == value.high else f" [{value.low:.0%}, {value.high:.0%}]"
    return f"{value.mean:.1%}{spread}"


def _number(value: Interval | None, scale: float = 1.0, digits: int = 3) -> str:
    if value is None:
        return "–"
    spread = "" if value.low == value.high else f" [{scale * value.low:.{digits}g}, {scale * value.high:.{digits}g}]"
    return f"{scale * value.mean:.{digits}g}{spread}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{cell}" for cell in head)
    return f"<table><tr>{top}" + "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows) + "</table>"


def _main_table(policies: dict[str, Any]) -> str:
    rows = []
    for label, p in policies.items():
        enough = p["evaluations_for_95_percent_of_best"]
        best = p["best"]
        rows.append(
            [
                html.escape(label),
                f"{_rate(best['success'])} at {best['evaluations']}",
                f"{enough['median']:g} ({', '.join(map(str, enough['by_seed']))})",
                _number(p["evaluations"][str(best["evaluations"])]["latency_ms"]),
                _number(best["jitter"], 1e6),
                _number(p["error_floor"], 1e3),
                _number(p["straightness"]),
                f"{p['parameters']:,}",
            ]
        )
    head = [
        "policy",
        "best success, at evaluations",
        "evaluations for 95 % of its best (each seed)",
        "ms a chunk at its best",
        "jitter, 1e-6 units²",
        "error floor, 1e-3 units",
        "straightness (0: straight)",
        "parameters",
    ]
    return _table(head, rows)


def _one_step_table(policies: dict[str, Any]) -> str:
    rows = []
    for label, p in policies.items():
        if "1" in p["evaluations"] and len(p["evaluations"]) > 1:
            one, best = p["evaluations"]["1"], p["evaluations"][str(p["best"]["evaluations"])]
            rows.append(
                [html.escape(label), _rate(one["success"]), _rate(best["success"]), _number(one["error"], 1e3),
                 _number(best["error"], 1e3), _number(p["straightness"])]
            )  # fmt: skip
    head = ["policy", "success at 1", "best success", "error at 1, 1e-3 units", "error at its best", "straightness"]
    return _table(head, rows)


def _full_table(policies: dict[str, Any]) -> str:
    rows = []
    for label, p in policies.items():
        for count, at in p["evaluations"].items():
            rows.append(
                [html.escape(label), count, _rate(at["success"]), _rate(at["pooled"]), _number(at["error"], 1e3),
                 _number(at["jitter"], 1e6), _number(at["latency_ms"])]
            )  # fmt: skip
    head = ["policy", "evaluations", "success, seeds", "success, pooled (Wilson)", "error, 1e-3 units",
            "jitter, 1e-6 units²", "ms a chunk"]  # fmt: skip
    return _table(head, rows)


def coverage(latency: float, horizon: int, rate: float) -> tuple[float, float]:
    """Share of a control loop's ticks that have an action: where the robot waits for each chunk, and where the next is
    computed while one is executed.

    Args:
        latency: seconds a chunk.
        horizon: actions of a chunk, all of which are executed.
        rate: actions a second.
    """
    playing = horizon / rate
    return playing / (playing + latency), min(1.0, playing / latency)


def _control_table(latencies: dict[str, dict[str, float]]) -> str:
    rows = []
    for horizon in HORIZONS:
        for steps in CONTROL_STEPS:
            latency = latencies[str(horizon)][str(steps)]
            shares = [coverage(latency, horizon, rate) for rate in RATES]
            covered = [f"{waiting:.0%} / {beside:.0%}" for waiting, beside in shares]
            rows.append([str(horizon), str(steps), f"{1000 * latency:.1f}", *covered])
    head = ["actions a chunk", "Euler steps", "ms a chunk", *(f"at {rate} Hz" for rate in RATES)]
    text = (
        "Share of the ticks of a control loop that have an action, if the robot waits for each chunk / if the next is "
    )
    text += "computed meanwhile; all actions of a chunk are executed, and the latency is this machine's for one robot."
    return f"<p>{text}</p>{_table(head, rows)}"


def _colors(count: int):
    from matplotlib import colormaps

    return [colormaps["tab20"](i / 20) for i in range(count)]


def _curves(policies: dict[str, Any], key: str, label: str) -> bytes:
    figure, axes = new_figure(1, height=4.6)
    ticks = sorted({int(n) for p in policies.values() for n in p["evaluations"]})
    for (name, p), color in zip(policies.items(), _colors(len(policies)), strict=True):
        counts = [int(n) for n in p["evaluations"]]
        values = [p["evaluations"][str(n)][key] for n in counts]
        mean = np.array([v.mean for v in values])
        axes[0].plot(counts, mean, marker="o", markersize=4, label=name, color=color)
        axes[0].fill_between(counts, [v.low for v in values], [v.high for v in values], color=color, alpha=0.12)
    axes[0].set(xscale="log", xlabel="network evaluations a chunk", ylabel=label)
    axes[0].set_xticks(ticks, map(str, ticks))
    axes[0].minorticks_off()
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure_svg(figure)


def _bars(policies: dict[str, Any]) -> bytes:
    figure, axes = new_figure(2, height=0.36 * len(policies) + 1.0, sharey=True)
    names = list(policies)[::-1]
    values = ([policies[n]["best"]["jitter"] for n in names], [policies[n]["error_floor"] for n in names])
    for a, intervals, scale, label in zip(
        axes, values, (1e6, 1e3), ("jitter, 1e-6 units²", "error floor, 1e-3 units"), strict=True
    ):
        mean = scale * np.array([i.mean for i in intervals])
        low, high = (scale * np.array([i[k] for i in intervals]) for k in (1, 2))
        a.barh(names, mean, color="#93c5fd")
        a.errorbar(mean, range(len(names)), xerr=[mean - low, high - mean], fmt="none", ecolor="#1e3a8a", capsize=3)
        a.set(xlabel=label)
        a.set_xlim(0, 1.05 * high.max())
    return figure_svg(figure)


def _paths(done: list[dict[str, Any]]) -> bytes:
    first = min(cell["seed"] for cell in done)
    drawn = [
        (cell["name"], np.array(paths))
        for cell in done
        if cell["seed"] == first
        for paths in cell["paths"].values()
        if cell["name"] in ("flow", "reflow", "diffusion-epsilon", "diffusion-v")
    ] or [(cell["name"], np.array(p)) for cell in done for p in cell["paths"].values()][:4]
    figure, axes = new_figure(len(drawn), height=2.8, sharey=True)
    for a, (name, paths) in zip(axes, drawn, strict=True):
        a.plot(np.linspace(1, 0, paths.shape[1]), paths.T, color="#2563eb", alpha=0.5, linewidth=0.8)
        a.set_title(name, fontsize=10)
        a.set_xlabel("t")
        a.invert_xaxis()
    return figure_svg(figure)
