"""The report of a run: one HTML file, with its plots and videos inside.

It measures as it is written: closed-loop success at 10, 4, 2 and 1 solver steps, success under counterfactual
instructions where the simulator has them, and the error of chunks against held-out demonstrations.
"""

from __future__ import annotations

import html
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pi0_jax import checkpoint
from pi0_jax.config import TrainConfig
from pi0_jax.data.robots import RawObservation
from pi0_jax.evaluate.chunk_errors import held_out
from pi0_jax.evaluate.page import (
    BLUE,
    GREY,
    ORANGE,
    bars,
    figure_svg,
    new_figure,
    page,
    step_ticks,
    table,
    video_tag,
)
from pi0_jax.evaluate.rollout import Rate, Rollout, roll_out
from pi0_jax.evaluate.simulators.gym import Episodes
from pi0_jax.inference.policy import Policy

Section = tuple[str, bytes | None, str]
"""Title, SVG and HTML of a part of the page."""
STEPS = (10, 4, 2, 1)
REFERENCE_STEPS = 100
"""Solver steps that stand for the exact solution of the flow."""
DECODED = "decoded"
"""Stands for the number of solver steps of policies that decode tokens."""


def write_report(
    policy: Policy,
    run: Path,
    simulator: Episodes,
    counterfactual: Episodes | None,
    num_episodes: int,
    seed: int,
    path: Path,
    measured: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Evaluates a policy and writes the report, and the figures in it as `report.json` beside it.

    `run` has the loss curves and the held-out demonstrations. `counterfactual` is the simulator with instructions that
    ask for something else than what is scored; None: there is none. `num_episodes` are run for each number of solver
    steps. `measured` says what was measured: figures besides, such as the checkpoint's step.

    Returns:
        The figures, as in `report.json`.
    """
    decodes, rollouts = policy.config.objective.decodes, {}
    settings = (None,) if decodes else STEPS
    for steps in settings:
        title = "closed loop" if decodes else f"closed loop, {steps:>2} solver steps"
        film = range(len(simulator.tasks)) if steps == settings[0] else ()
        found = roll_out(policy, simulator, num_episodes, seed, num_steps=steps, film=film, progress=title)
        rollouts[steps or DECODED] = found
    main, rates = rollouts[settings[0] or DECODED], {steps: rollout.rates() for steps, rollout in rollouts.items()}
    rate = main.rates()
    control = None
    if counterfactual is not None:
        title = "counterfactual instructions"
        found = roll_out(policy, counterfactual, num_episodes, seed, num_steps=settings[0], progress=title)
        control = found.rates()["all"]._asdict()
    train = checkpoint.load_assets(run).train
    figures = {
        **measured,
        "success": {task: found._asdict() for task, found in rate.items()},
        "success_by_steps": {steps: found["all"]._asdict() for steps, found in rates.items()},
        "success_under_counterfactual_instructions": control,
        "chunk_error": chunk_errors(policy, train),
        "latency_ms_per_call": {steps: float(np.median(rollout.seconds) * 1000) for steps, rollout in rollouts.items()},
        "batch_size": main.batch_size,
        "episodes": num_episodes,
        "seed": seed,
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }
    sections: list[Section] = [
        ("Success by instruction", _success_plot(rate), "Bars are 95 % Wilson intervals."),
        *_counterfactual(control),
        ("Episodes", None, f'<div class="videos">{_videos(main, simulator.fps)}</div>'),
        ("Compute against accuracy", None if decodes else _steps_plot(figures), _steps_table(figures)),
        *([] if decodes else [_denoising(policy, simulator.start(0, seed).observe(), seed)]),
        *_training(read_metrics(run / "metrics.jsonl"), train),
    ]
    model, overall = policy.config.model, rate["all"]
    lead = (
        f"<b>{overall.rate:.1%}</b> success in closed loop: {overall.successes} of {overall.episodes} fresh episodes, "
        f"95 % interval {overall.low:.1%} to {overall.high:.1%}, "
        + ("its tokens decoded." if decodes else f"{STEPS[0]} solver steps.")
    )
    family = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "π0-FAST"}[model.variant]
    footer = (
        f"{family}, cameras {', '.join(model.cameras)}, chunks of "
        f"{model.action_horizon} actions of which {policy.config.execute_steps} are executed; evaluation seed {seed}; "
        f"{figures['device']}, JAX {figures['jax']}. Made by pi0_jax. The figures are in <code>report.json</code>."
    )
    path.write_text(page(run.name, lead, sections, footer), encoding="utf-8")
    path.with_name("report.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def chunk_errors(policy: Policy, train: TrainConfig | None) -> dict[int | str, dict[str, float]] | None:
    """Error of sampled chunks on held-out demonstrations, by number of solver steps; None without such data.

    `to_expert` is the root-mean-square difference to the demonstrated actions over valid steps, `to_exact` that to the
    flow's own solution from the same noise, where there is a flow; both in robot units.
    """
    data = held_out(train, policy.robot)
    if data is None:
        return None
    keys = jax.random.split(jax.random.key(0), len(data.observations))
    if policy.config.objective.decodes:
        return {DECODED: {"to_expert": data.rms(policy.infer_batch(data.observations, keys) - data.expert)}}
    chunks = {
        steps: policy.infer_batch(data.observations, keys, steps)
        for steps in tqdm((*STEPS, REFERENCE_STEPS), desc="error of chunks", unit="setting")
    }
    exact = chunks[REFERENCE_STEPS]
    return {
        steps: {"to_expert": data.rms(chunks[steps] - data.expert), "to_exact": data.rms(chunks[steps] - exact)}
        for steps in STEPS
    }


def read_metrics(path: Path) -> list[dict[str, float | int]]:
    """The rows of a run's `metrics.jsonl`; empty where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _success_plot(rates: dict[str, Rate]) -> bytes:
    figure, (axes,) = new_figure(height=0.42 * len(rates) + 0.8)
    bars(axes, list(rates), [(rate.rate, rate.low, rate.high) for rate in rates.values()])
    for i, rate in enumerate(reversed(rates.values())):
        axes.text(0.01, i, f"{rate.successes}/{rate.episodes}", va="center", fontsize=8)
    axes.set(xlim=(0, 1), xlabel="success rate")
    return figure_svg(figure)


def _steps_plot(figures: dict[str, Any]) -> bytes:
    errors, rates = figures["chunk_error"], figures["success_by_steps"]
    figure, axes = new_figure(2 if errors else 1)
    steps = sorted(rates)
    rate, low, high = (np.array([rates[s][key] for s in steps]) for key in ("rate", "low", "high"))
    spread = np.maximum([rate - low, high - rate], 0)
    axes[0].errorbar(steps, rate, yerr=spread, marker="o", color=BLUE, capsize=3)
    axes[0].set(ylabel="success rate", ylim=(0, 1.02))
    if errors:
        label = f"to {REFERENCE_STEPS} steps from the same noise"
        for key, color, text in (("to_expert", ORANGE, "to the expert"), ("to_exact", GREY, label)):
            axes[1].plot(steps, [errors[s][key] for s in steps], marker="o", color=color, label=text)
        axes[1].set(ylabel="RMS error of actions (robot units)")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(frameon=False)
    for a in axes:
        step_ticks(a, steps)
        a.set_xlabel("solver steps")
    return figure_svg(figure)


def _steps_table(figures: dict[str, Any]) -> str:
    errors, latency = figures["chunk_error"], figures["latency_ms_per_call"]
    rows = []
    for s, rate in sorted(figures["success_by_steps"].items()):
        row = [s, f"{rate['rate']:.1%}", f"{rate['low']:.1%} to {rate['high']:.1%}", f"{latency[s]:.0f}"]
        rows.append(row + ([f"{error:.4f}" for error in errors[s].values()] if errors else []))
    head = ["solver steps", "success", "95 % interval", "ms per call"]
    head += ["RMS error to the expert", "to the exact flow"][: len(next(iter(errors.values())))] if errors else []
    calls = f"One call makes {figures['batch_size']} chunks; images, tokens and transfers included."
    return f"{table(head, rows)}<p>{calls}</p>"


def _counterfactual(control: dict[str, Any] | None) -> list[Section]:
    if control is None:
        return []
    text = (
        "Where the instruction asks for something <em>else</em>, the scored task is done in "
        f"{control['rate']:.1%} of {control['episodes']} episodes with the same layouts. A policy that ignores the "
        "language instruction would score alike in both."
    )
    return [("Counterfactual instructions", None, text)]


def _videos(rollout: Rollout, fps: int) -> str:
    return "".join(
        video_tag(
            each.pictures, fps, f"“{each.prompt}”: {f'done in {each.num_steps} steps' * each.success or 'failed'}"
        )
        for each in rollout.outcomes
        if each.pictures
    )


def _denoising(policy: Policy, observation: RawObservation, seed: int) -> Section:
    points = policy.denoise(observation, seed, STEPS[0])
    shown = np.unique(np.linspace(0, len(points) - 1, min(6, len(points))).astype(int))
    figure, axes = new_figure(len(shown), height=2.4, sharey=True)
    for a, i in zip(axes, shown, strict=True):
        for name, values in zip(policy.robot.actions, points[i].T, strict=True):
            a.plot(np.arange(1, len(values) + 1), values, marker=".", label=name)
        a.set_title(f"t = {1 - i / (len(points) - 1):.1f}", fontsize=10)
        a.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        a.set_xlabel("step")
    axes[0].legend(frameon=False, fontsize=8)
    text = (
        f"“{html.escape(observation['prompt'])}”. Each panel is the chunk at one moment of the flow, from noise "
        "(t = 1) to actions (t = 0), in robot units."
    )
    return "From noise to a chunk of actions", figure_svg(figure), text


def _training(metrics: list[dict[str, float | int]], train: TrainConfig | None) -> list[Section]:
    if not metrics:
        return []
    names = ("num_steps", "batch_size", "optim.name", "optim.peak_lr", "policy.objective", "seed")
    text = "" if train is None else table((), [(name, operator.attrgetter(name)(train)) for name in names])
    return [("Training", _loss_plot(metrics), text)]


def _loss_plot(metrics: list[dict[str, float | int]]) -> bytes:
    figure, axes = new_figure(2)
    train = [(row["step"], row["loss"], row.get("grad_norm")) for row in metrics if "loss" in row]
    step, loss, norm = (np.array(column, float) for column in zip(*train, strict=True))
    axes[0].plot(step, loss, color=BLUE, alpha=0.25, linewidth=0.6)
    window = max(1, len(loss) // 60)
    if len(loss) > window:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes[0].plot(step[window - 1 :], smooth, color=BLUE, label="training")
    validation = [(row["step"], row["validation_loss"]) for row in metrics if "validation_loss" in row]
    if validation:
        axes[0].plot(*zip(*validation, strict=True), color=ORANGE, marker="o", markersize=3, label="held out")
    axes[0].set(xlabel="step", ylabel="training loss", yscale="log")
    axes[0].legend(frameon=False)
    axes[1].plot(step, norm, color=GREY, linewidth=0.6)
    axes[1].set(xlabel="step", ylabel="gradient norm", yscale="log")
    return figure_svg(figure)
