"""How soon a policy learns: success in closed loop after more and more updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax import checkpoint
from pi0_jax.compare.config import CompareConfig
from pi0_jax.evaluate.page import figure_svg, new_figure, table
from pi0_jax.evaluate.rollout import roll_out, success_rate
from pi0_jax.evaluate.simulators.gym import Episodes
from pi0_jax.inference.policy import Policy
from pi0_jax.sampler import Sampler


def curve(
    config: CompareConfig, path: Path, how: tuple[Sampler, int | None], simulator: Episodes, seed: int, batch_size: int
) -> list[dict[str, int]]:
    """Successes after each `config.measure_every` updates, but for the last ones; empty where that is None.

    Args:
        config: the comparison.
        path: folder of a contender's run.
        how: sampler, and solver steps.
        simulator: of the closed loop.
        seed: of the layouts.
        batch_size: episodes side by side.
    """
    points = []
    for step in checkpoint.steps(path)[:-1] if config.measure_every else ():
        policy = Policy.load(path / "checkpoints" / str(step), sampler=how[0])
        rates = roll_out(policy, simulator, config.episodes, seed, num_steps=how[1], batch_size=batch_size).rates()
        points.append({"step": step, "successes": rates["all"].successes, "episodes": rates["all"].episodes})
    return points


def summary(cells: list[dict[str, Any]], enough: float) -> dict[str, Any] | None:
    """Curves of one contender's seeds: `success` by updates, pooled over seeds as a rate with its Wilson interval; and
    `learnt_at`, the updates of each seed after which success first was `enough`, None where it never was. None without
    curves."""
    curves = [cell["curve"] for cell in cells if cell.get("curve")]
    if not curves:
        return None
    success = {}
    for points in zip(*curves, strict=False):
        rate = success_rate(sum(p["successes"] for p in points), sum(p["episodes"] for p in points))
        success[str(points[0]["step"])] = [rate.rate, rate.low, rate.high]
    reached = [[p["step"] for p in points if p["successes"] >= enough * p["episodes"]] for points in curves]
    return {"success": success, "learnt_at": [min(steps, default=None) for steps in reached]}


def section(policies: dict[str, Any], enough: float, spread: Any) -> list[tuple[str, bytes | None, str]]:
    """The section of the page, where there are curves. `spread` is the mean of values with its interval over seeds."""
    found = {name: p["learning"] for name, p in policies.items() if p["learning"]}
    if not found:
        return []
    rows = []
    for name, p in found.items():
        at, (rate, low, high) = p["learnt_at"], [*p["success"].values()][-1]
        mean = "–" if None in at else spread([float(n) for n in at if n is not None]).text(style=".0f")
        rows.append(
            [name, ", ".join("never" if n is None else str(n) for n in at), mean, f"{rate:.1%} [{low:.1%}, {high:.1%}]"]
        )
    head = ["policy", f"updates until {enough:.0%} (each seed)", "mean", "success at the end (Wilson)"]
    return [("How soon does each follow the instruction?", _figure(found, enough), table(head, rows))]


def _figure(found: dict[str, Any], enough: float) -> bytes:
    figure, (axes,) = new_figure(height=4.2)
    for name, p in found.items():
        steps = [int(step) for step in p["success"]]
        mean, low, high = np.array([*p["success"].values()]).T
        (line,) = axes.plot(steps, mean, marker="o", markersize=4, label=name)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.1)
    axes.axhline(enough, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="updates", ylabel="success rate", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure_svg(figure)
