"""The page of a comparison, and its figures as JSON: made from whatever cells are done."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pi0_jax.compare.behaviour import mode_coverage
from pi0_jax.compare.cells import CELL, CONTROL_STEPS, HORIZONS, cells, control_latencies, folder
from pi0_jax.compare.config import CompareConfig
from pi0_jax.compare.learning import section, summary
from pi0_jax.errors import UserError
from pi0_jax.evaluate.page import BLUE, bars, figure_svg, new_figure, page, step_ticks, table
from pi0_jax.evaluate.rollout import success_rate

RATES = (50, 100, 500)
"""Control rates, Hz."""
SHARE = 0.95
"""Share of its own best success that a policy has to reach to count as good."""


class Interval(NamedTuple):
    """A mean, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, scale: float = 1.0, style: str = ".3g") -> str:
        """The mean, with its interval where there is one."""
        mean, low, high = (f"{scale * value:{style}}" for value in self)
        return mean if self.low == self.high else f"{mean} [{low}, {high}]"


def over_seeds(values: list[float], low: float = 0.0, high: float = np.inf) -> Interval:
    """Mean over training seeds with Student's 95 % interval, cut to what is possible; one seed has no interval."""
    from scipy.stats import t as student

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
        UserError: no cell is done yet.
    """
    paths = [folder(config, seed, name) / CELL for seed, name in cells(config) if name in config.contenders]
    done = [json.loads(path.read_text()) for path in paths if path.is_file()]
    if not done:
        raise UserError(f"nothing to compare in {config.run_dir} yet.")
    root = Path(config.run_dir)
    demonstrated = done[0].get("demonstrated")
    control = root / "control.json"
    if config.control and not control.is_file():
        control.write_text(json.dumps(control_latencies(config), indent=1) + "\n")
    figures = summarize(done, demonstrated, config.learnt) | {
        "demonstrated": demonstrated,
        "control_latency_seconds": json.loads(control.read_text()) if config.control else None,
        "settings": {
            "seeds": list(config.seeds),
            "backbone_steps": config.backbone_steps if config.backbone is not None else None,
            "learnt": config.learnt,
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


def summarize(
    done: list[dict[str, Any]], demonstrated: dict[str, int] | None = None, learnt: float = 0.5
) -> dict[str, Any]:
    """The figures of all cells, by policy (contender and sampler) and number of network evaluations. `demonstrated` are
    the demonstrations by mode, where there are several; `learnt` is the success from which on one counts as learnt."""
    policies: dict[str, Any] = {}
    for label, (name, sampler) in _labels(done).items():
        mine = [cell for cell in done if cell["name"] == name]
        rows = [[row for row in cell["rows"] if row["sampler"] == sampler] for cell in mine]
        counts = [row["evaluations"] for row in rows[0]]
        by_count = {str(n): _at(rows, n, demonstrated) for n in counts}
        enough = [_enough(r) for r in rows]
        best = max(counts, key=lambda n: (by_count[str(n)]["success"].mean, -n))
        straightness = [cell["straightness"][sampler] for cell in mine if sampler in cell["straightness"]]
        policies[label] = {
            "evaluations": by_count,
            "best": {"evaluations": best, **by_count[str(best)]},
            "evaluations_for_95_percent_of_best": {"median": float(np.median(enough)), "by_seed": enough},
            "error_floor": over_seeds([min(row["error_floor"] for row in r) for r in rows]),
            "straightness": over_seeds(straightness) if straightness else None,
            "delays": _delays(mine) if sampler == mine[0]["rows"][0]["sampler"] else [],
            "learning": summary(mine, learnt) if sampler == mine[0]["rows"][0]["sampler"] else None,
            "parameters": mine[0]["parameters"],
            "training_seconds": float(np.mean([cell["training_seconds"] for cell in mine])),
        }
    return {"policies": policies}


def _labels(done: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Label to contender and sampler, in the order of the cells; the sampler is named where there are several."""
    labels = {}
    for cell in done:
        samplers = list(dict.fromkeys(row["sampler"] for row in cell["rows"]))
        for sampler in samplers:
            labels[f"{cell['name']} ({sampler})" if len(samplers) > 1 else cell["name"]] = (cell["name"], sampler)
    return labels


def _at(rows: list[list[dict[str, Any]]], count: int, demonstrated: dict[str, int] | None) -> dict[str, Any]:
    """What all seeds measured at one number of evaluations."""
    chosen = [row for seed in rows for row in seed if row["evaluations"] == count]
    pooled = success_rate(sum(row["successes"] for row in chosen), sum(row["episodes"] for row in chosen))
    ways = {}
    if demonstrated:
        taken = {mode: sum(row["modes"][mode] for row in chosen) for mode in demonstrated}
        different, pairs = np.sum([row["pairs"] for row in chosen], axis=0)
        ways = {
            "modes": taken,
            "coverage": mode_coverage(taken, demonstrated),
            "both_from_one_layout": float(different / pairs) if pairs else None,
        }
    return {
        **ways,
        "success": over_seeds([row["successes"] / row["episodes"] for row in chosen], high=1.0),
        "pooled": Interval(pooled.rate, pooled.low, pooled.high),
        **{key: over_seeds([row[key] for row in chosen]) for key in ("error", "jitter", "latency_ms")},
    }


def _delays(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each way of acting and latency, what all seeds measured."""
    found = [row for cell in cells for row in cell.get("delays", [])]
    rows = []
    for way, latency in dict.fromkeys((row["way"], row["latency_ms"]) for row in found):
        mine = [row for row in found if (row["way"], row["latency_ms"]) == (way, latency)]
        pooled = success_rate(sum(row["successes"] for row in mine), sum(row["episodes"] for row in mine))
        means = {
            key: float(np.mean([row[key] for row in mine])) for key in ("seconds", "held", "seam", "inside", "break")
        }
        rows.append({"way": way, "latency_ms": latency, "pooled": pooled[2:], **means})
    return rows


def _known(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def _enough(rows: list[dict[str, Any]]) -> int:
    """Fewest evaluations with at least 95 % of the best success of one seed."""
    rates = {row["evaluations"]: row["successes"] / row["episodes"] for row in rows}
    return min(n for n, rate in rates.items() if rate >= SHARE * max(rates.values()))


def _page(figures: dict[str, Any], pictures: dict[str, bytes]) -> str:
    policies, settings, control = (figures[name] for name in ("policies", "settings", "control_latency_seconds"))
    seeds = len(settings["seeds"])
    spread = f"over {seeds} training seeds" if seeds > 1 else "one training seed: no interval over seeds"
    sections = [
        *section(policies, settings["learnt"], over_seeds),
        ("How many evaluations does each need?", pictures["success"], _main_table(policies)),
        (
            "Who jitters, who is precise?",
            pictures["jitter"],
            "Jitter: mean squared third difference of the executed actions, at the number of evaluations with the best "
            "success. Error floor: the tenth percentile over held-out frames of the root-mean-square error to the "
            "expert, at the best number of evaluations.",
        ),
        ("Error of a chunk to the expert", pictures["error"], ""),
        (
            "From noise to an action",
            pictures["paths"],
            "The first coordinate of a chunk's first action for one observation and 64 draws of noise, in the model's "
            "units, over 50 steps from noise (left) to action (right).",
        ),
        *_behaviour(policies, figures["demonstrated"]),
        *([("High-rate control", None, _control_table(control))] if control else []),
        ("All figures", None, _full_table(policies)),
    ]
    begins = "random weights"
    if settings["backbone_steps"]:
        begins = f"the same backbone ({settings['backbone_steps']} steps of plain regression)"
    return page(
        "Kinds of policies, trained and measured alike",
        f"Every policy starts from {begins} and is trained for {settings['steps']} steps of batch {settings['batch']} "
        "with the same optimizer, and with the same data but where it is called otherwise; "
        f"{settings['episodes']} fresh episodes for each figure. Intervals are 95 %, {spread}.",
        sections,
        f"{html.escape(settings['environment'])}, seeds {', '.join(map(str, settings['seeds']))}, "
        f"{html.escape(settings['device'])}, JAX {settings['jax']}. Made by pi0_jax; the figures are in "
        "<code>compare.json</code>.",
    )


def _behaviour(policies: dict[str, Any], demonstrated: dict[str, int] | None) -> list[tuple[str, None, str]]:
    """Sections on the modes, and on delay, where they were measured."""
    sections = []
    if demonstrated:
        shares = [f"{count / sum(demonstrated.values()):.0%}" for count in demonstrated.values()]
        rows = [["demonstrations", "–", "–", *shares, "100%", f"{_different(demonstrated):.0%}"]]
        for label, p in policies.items():
            for count, at in p["evaluations"].items():
                total, both = max(1, sum(at["modes"].values())), at["both_from_one_layout"]
                taken = [f"{n / total:.0%}" for n in at["modes"].values()]
                share = "–" if both is None else f"{both:.0%}"
                rows.append([label, count, f"{at['pooled'].mean:.0%}", *taken, f"{at['coverage']:.0%}", share])
        text = (
            "Of the successful episodes. Coverage: overlap with the demonstrations' distribution over the ways. Last: "
            "of the pairs of successful episodes with one layout, how many went different ways."
        )
        head = ["policy", "evaluations", "success", *demonstrated, "coverage", "different from one layout"]
        sections.append(("Which of the right ways?", None, f"<p>{text}</p>{table(head, rows)}"))
    rows = [
        [
            label,
            row["way"],
            row["latency_ms"],
            Interval(*row["pooled"]).text(style=".1%"),
            *(_known(row[key]) for key in ("seconds", "held")),
            *(_known(1e3 * row[key]) for key in ("seam", "inside", "break")),
        ]
        for label, p in policies.items()
        for row in p["delays"]
    ]
    if rows:
        text = (
            "Simulated time, in which answers come so late. Seconds per successful episode; steps held still per "
            "episode; mean changes from one action to the next where a chunk begins, and inside chunks; departure of a "
            "new chunk from the old. 1e-3 units."
        )
        head = ["policy", "way of acting", "latency, ms", "success (Wilson)", "seconds"]
        head += ["held", "at seams", "inside", "departure"]
        sections.append(("What does delay do?", None, f"<p>{text}</p>{table(head, rows)}"))
    return sections


def _different(counts: dict[str, int]) -> float:
    """Probability that two draws from a distribution differ."""
    shares = np.array([*counts.values()]) / sum(counts.values())
    return float(1 - np.square(shares).sum())


def _main_table(policies: dict[str, Any]) -> str:
    rows = {
        label: {
            "best success, at evaluations": f"{p['best']['success'].text(style='.0%')} at {p['best']['evaluations']}",
            "evaluations for 95 % of its best (each seed)": "{median:g} {by_seed}".format(
                **p["evaluations_for_95_percent_of_best"]
            ),
            "ms per chunk at its best": p["best"]["latency_ms"].text(),
            "jitter, 1e-6 units²": p["best"]["jitter"].text(1e6),
            "error floor, 1e-3 units": p["error_floor"].text(1e3),
            "straightness (0: straight)": p["straightness"].text() if p["straightness"] else "–",
            "parameters": f"{p['parameters']:,}",
        }
        for label, p in policies.items()
    }
    return table(["policy", *next(iter(rows.values()))], [[label, *row.values()] for label, row in rows.items()])


def _full_table(policies: dict[str, Any]) -> str:
    columns = {
        "success": ("success, seeds", 1.0, ".1%"),
        "pooled": ("success, pooled (Wilson)", 1.0, ".1%"),
        "error": ("error, 1e-3 units", 1e3, ".3g"),
        "jitter": ("jitter, 1e-6 units²", 1e6, ".3g"),
        "latency_ms": ("ms per chunk", 1.0, ".3g"),
    }
    rows = [
        [label, count, *(at[key].text(scale, style) for key, (_, scale, style) in columns.items())]
        for label, p in policies.items()
        for count, at in p["evaluations"].items()
    ]
    return table(["policy", "evaluations", *(head for head, _, _ in columns.values())], rows)


def coverage(latency: float, horizon: int, rate: float | int) -> tuple[float, float]:
    """Share of a control loop's ticks that have an action: where the robot waits for each chunk, and where the next is
    computed while one is executed.

    Args:
        latency: seconds per chunk.
        horizon: actions of a chunk, all of which are executed.
        rate: actions per second.
    """
    playing = horizon / rate
    return playing / (playing + latency), min(1.0, playing / latency)


def _control_table(latencies: dict[str, dict[str, float]]) -> str:
    rows = []
    for horizon in HORIZONS:
        for steps in CONTROL_STEPS:
            latency = latencies[str(horizon)][str(steps)]
            shares = [coverage(latency, horizon, rate) for rate in RATES]
            rows.append([horizon, steps, f"{1000 * latency:.1f}", *(f"{a:.0%} / {b:.0%}" for a, b in shares)])
    head = ["actions per chunk", "Euler steps", "ms per chunk", *(f"at {rate} Hz" for rate in RATES)]
    text = (
        "Share of the ticks of a control loop that have an action, if the robot waits for each chunk / if the next is "
        "computed meanwhile; all actions of a chunk are executed, and the latency is this machine's for one robot."
    )
    return f"<p>{text}</p>{table(head, rows)}"


def _curves(policies: dict[str, Any], key: str, label: str) -> bytes:
    from matplotlib import colormaps

    figure, (axes,) = new_figure(height=4.6)
    for i, (name, p) in enumerate(policies.items()):
        counts, color = [int(n) for n in p["evaluations"]], colormaps["tab20"](i / 20)
        mean, low, high = np.array([at[key] for at in p["evaluations"].values()]).T
        axes.plot(counts, mean, marker="o", markersize=4, label=name, color=color)
        axes.fill_between(counts, low, high, color=color, alpha=0.12)
    step_ticks(axes, sorted({int(n) for p in policies.values() for n in p["evaluations"]}))
    axes.set(xlabel="network evaluations per chunk", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure_svg(figure)


def _bars(policies: dict[str, Any]) -> bytes:
    figure, axes = new_figure(2, height=0.36 * len(policies) + 1.0, sharey=True)
    bars(axes[0], list(policies), [p["best"]["jitter"] for p in policies.values()], 1e6)
    bars(axes[1], list(policies), [p["error_floor"] for p in policies.values()], 1e3)
    for a, label in zip(axes, ("jitter, 1e-6 units²", "error floor, 1e-3 units"), strict=True):
        a.set(xlabel=label)
        a.set_xlim(left=0)
    return figure_svg(figure)


def _paths(done: list[dict[str, Any]]) -> bytes:
    """Sampled coordinates from noise to action, of the first seed's contenders."""
    first = min(cell["seed"] for cell in done)
    drawn = [(c["name"], np.array(p)) for c in done if c["seed"] == first for p in list(c["paths"].values())[:1]]
    figure, axes = new_figure(max(1, len(drawn)), height=2.8, sharey=True)
    for a, (name, paths) in zip(axes, drawn, strict=False):
        a.plot(np.linspace(1, 0, paths.shape[1]), paths.T, color=BLUE, alpha=0.5, linewidth=0.8)
        a.set_title(name, fontsize=8)
        a.set_xlabel("t")
        a.invert_xaxis()
    return figure_svg(figure)
