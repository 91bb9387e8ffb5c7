"""The report of a run: one HTML file, with its plots and videos inside.

It measures as it is written: closed-loop success at 10, 4, 2 and 1 solver steps, success when the instruction names
another object, and the error of chunks against held-out demonstrations.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from pi0_jax import checkpoint
from pi0_jax.config import TrainConfig
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.loader import valid_steps
from pi0_jax.data.source import ACTION, STATE
from pi0_jax.data.video import VideoWriter
from pi0_jax.evaluate.rollout import Outcome, Rollout, roll_out, wilson
from pi0_jax.evaluate.simulators.suites import Suite
from pi0_jax.inference.policy import Policy

STEPS = (10, 4, 2, 1)
REFERENCE_STEPS = 100
"""Euler steps that stand for the exact solution of the flow."""
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"


def write_report(
    policy: Policy, run: str | Path, suite: Suite, num_episodes: int, seed: int, path: str | Path
) -> dict[str, Any]:
    """Evaluates a policy and writes the report, and the figures in it as `report.json` beside it.

    Args:
        policy: loaded from `run`.
        run: run folder, for the loss curves and the held-out demonstrations.
        suite: the simulator.
        num_episodes: episodes for each number of solver steps.
        seed: of the evaluation episodes.
        path: HTML file to write.

    Returns:
        The figures, as in `report.json`.
    """
    path = Path(path)
    film = range(min(len(suite.tasks), num_episodes))
    rollouts = {
        steps: roll_out(
            policy, suite, num_episodes, seed, num_steps=steps, film=film if steps == STEPS[0] else (),
            progress=f"closed loop, {steps:>2} solver step{'s' * (steps > 1)}",
        )
        for steps in STEPS
    }  # fmt: skip
    main = rollouts[STEPS[0]]
    distracted = roll_out(policy, suite, num_episodes, seed, distract=True, progress="told to use another object")
    train = checkpoint.load_assets(run).train
    errors = chunk_errors(policy, train)
    points, observation = denoising(policy, suite, seed)
    metrics = read_metrics(Path(run) / "metrics.jsonl")

    figures = {
        "success": _rates(main),
        "success_by_steps": {steps: _rates(rollout)["all"] for steps, rollout in rollouts.items()},
        "success_when_told_another_object": _rates(distracted)["all"],
        "chunk_error": errors,
        "latency_ms_a_call": {steps: float(np.median(rollout.seconds) * 1000) for steps, rollout in rollouts.items()},
        "batch_size": main.batch_size,
        "episodes": num_episodes,
        "seed": seed,
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }
    path.write_text(_page(run, policy, figures, metrics, main, points, observation, train, suite.fps), encoding="utf-8")
    path.with_name("report.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


class HeldOut(NamedTuple):
    """Frames of held-out demonstrations, and what the expert did from there."""

    observations: list[dict[str, Any]]
    expert: Float[np.ndarray, "b ah d"]
    """Robot units."""
    valid: Bool[np.ndarray, "b ah"]
    """False after the episode's end, and where the demonstration was disturbed on purpose."""


def held_out(train: TrainConfig | None, policy: Policy, count: int = 256) -> HeldOut | None:
    """Evenly spaced frames of a run's held-out demonstrations; None where it has none."""
    if train is None or train.data.validation_path is None or not Path(train.data.validation_path).is_dir():
        return None
    dataset = LeRobotDataset(train.data.validation_path)
    frames = np.linspace(0, dataset.num_frames - 1, min(count, dataset.num_frames)).astype(int)
    horizon = policy.config.model.action_horizon
    expert, inside = dataset.chunk(frames, horizon, ACTION)
    valid = inside & valid_steps(dataset, frames, horizon)
    state, images = dataset.columns(STATE), {c: dataset.frames(key) for key, c in policy.robot.cameras.items()}
    observations = [
        {"images": {c: pixels[i] for c, pixels in images.items()}, "state": state[i], "prompt": dataset.task(i)}
        for i in frames
    ]
    return HeldOut(observations, expert, valid)


def chunk_errors(policy: Policy, train: TrainConfig | None) -> dict[int, dict[str, float]] | None:
    """Error of sampled chunks on held-out demonstrations, by number of solver steps; None without such data.

    `to_expert` is the root-mean-square difference to the demonstrated actions over valid steps, `to_exact` that to the
    flow's own solution from the same noise; both in robot units.
    """
    data = held_out(train, policy)
    if data is None:
        return None
    keys = jax.random.split(jax.random.key(0), len(data.observations))
    chunks = {
        steps: policy.infer_batch(data.observations, keys, steps)
        for steps in tqdm((*STEPS, REFERENCE_STEPS), desc="error of chunks", unit="setting")
    }

    def rms(difference: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(difference)[data.valid])))

    exact = chunks[REFERENCE_STEPS]
    return {s: {"to_expert": rms(chunks[s] - data.expert), "to_exact": rms(chunks[s] - exact)} for s in STEPS}


def denoising(policy: Policy, suite: Suite, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The way of one chunk from noise to actions `[num_steps + 1, ah, d]`, and what the policy saw."""
    observation = suite.start(0, seed, distract=False).observe()
    return policy.denoise(observation, seed, STEPS[0]), observation


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`; empty where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _rates(rollout: Rollout) -> dict[str, dict[str, float]]:
    rates = {}
    for name, (won, total) in rollout.rates().items():
        low, high = wilson(won, total)
        rates[name] = {"successes": won, "episodes": total, "rate": won / total, "low": low, "high": high}
    return rates


def _page(run, policy, figures, metrics, main: Rollout, points, observation, train, fps: int) -> str:
    overall = figures["success"]["all"]
    other = figures["success_when_told_another_object"]
    model = policy.config.model
    variant = {"pi0": "π0", "pi05": "π0.5"}[model.variant]
    sections = [
        ("Success by instruction", _success_plot(figures["success"]), "Bars are 95 % Wilson intervals."),
        (
            "Does it listen?",
            None,
            f"Told to use <em>another</em> object, it does the scored task in {_percent(other)} of "
            f"{other['episodes']:.0f} episodes (same layouts). A policy that ignores language would score alike in "
            "both.",
        ),
        ("Episodes", None, _videos(main.outcomes, fps)),
        ("Compute against accuracy", _steps_plot(figures), _steps_text(figures)),
        (
            "From noise to a chunk of actions",
            _denoising_plot(points, policy.robot.actions),
            f"“{html.escape(observation['prompt'])}”. Each panel is the chunk at one moment of the flow, from noise "
            "(t = 1) to actions (t = 0), in robot units.",
        ),
    ]
    if metrics:
        sections.append(("Training", _loss_plot(metrics), _training_text(train, metrics)))
    body = "\n".join(_section(*section) for section in sections)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(Path(run).name)}: {_percent(overall)} success</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0 }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem }}
.lead {{ font-size: 1.15rem; color: #374151 }} .lead b {{ font-size: 2.2rem; color: {BLUE} }}
img {{ width: 100%; max-width: 54rem }} figure {{ margin: 0 }} figcaption {{ font-size: .85rem; color: {GREY} }}
.videos {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }}
video {{ width: 100%; border-radius: 6px }} table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .9rem .2rem 0; text-align: left }}
footer {{ margin-top: 3rem; font-size: .85rem; color: {GREY} }}
</style>
<h1>{html.escape(Path(run).name)}</h1>
<p class="lead"><b>{_percent(overall)}</b> success in closed loop: {overall["successes"]} of {overall["episodes"]} fresh
episodes, 95 % interval {overall["low"]:.1%} to {overall["high"]:.1%}, {STEPS[0]} Euler steps.</p>
{body}
<footer>{variant}, cameras {", ".join(model.cameras)}, chunks of {model.action_horizon} actions of which
{policy.config.execute_steps} are executed; evaluation seed {figures["seed"]}; {figures["device"]}, JAX
{figures["jax"]}. Made by pi0_jax. The figures are in <code>report.json</code>.</footer></html>
"""


def _section(title: str, picture: bytes | None, text: str) -> str:
    image = "" if picture is None else picture_tag(picture, title)
    return f"<section><h2>{title}</h2>{image}<div>{text}</div></section>"


def picture_tag(picture: bytes, text: str) -> str:
    """An SVG inside the page."""
    return f'<img src="{_data(picture, "image/svg+xml")}" alt="{html.escape(text)}">'


def _percent(rate: dict[str, float]) -> str:
    return f"{rate['rate']:.1%}"


def _success_plot(rates: dict[str, dict[str, float]]) -> bytes:
    figure, axes = new_figure(1, height=0.42 * len(rates) + 0.8)
    names = list(rates)[::-1]
    rate = np.array([rates[n]["rate"] for n in names])
    spread = [rate - [rates[n]["low"] for n in names], np.array([rates[n]["high"] for n in names]) - rate]
    colors = [BLUE if n == "all" else "#93c5fd" for n in names]
    axes[0].barh([n.replace("_", " ") for n in names], rate, color=colors)
    axes[0].errorbar(rate, range(len(names)), xerr=np.maximum(spread, 0), fmt="none", ecolor="#1e3a8a", capsize=3)
    for i, n in enumerate(names):
        axes[0].text(0.01, i, f"{rates[n]['successes']}/{rates[n]['episodes']}", va="center", fontsize=8)
    axes[0].set(xlim=(0, 1), xlabel="success rate")
    return figure_svg(figure)


def _steps_plot(figures: dict[str, Any]) -> bytes:
    errors = figures["chunk_error"]
    figure, axes = new_figure(2 if errors else 1)
    rates = figures["success_by_steps"]
    steps = sorted(rates)
    rate = np.array([rates[s]["rate"] for s in steps])
    spread = np.maximum([rate - [rates[s]["low"] for s in steps], [rates[s]["high"] for s in steps] - rate], 0)
    axes[0].errorbar(steps, rate, yerr=spread, marker="o", color=BLUE, capsize=3)
    axes[0].set(xlabel="Euler steps", ylabel="success rate", ylim=(0, 1.02), xscale="log")
    if errors:
        axes[1].plot(steps, [errors[s]["to_expert"] for s in steps], marker="o", color=ORANGE, label="to the expert")
        label = f"to {REFERENCE_STEPS} steps from the same noise"
        axes[1].plot(steps, [errors[s]["to_exact"] for s in steps], marker="s", color=GREY, label=label)
        axes[1].set(xlabel="Euler steps", ylabel="RMS error of actions (robot units)", xscale="log")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(frameon=False)
    for a in axes:
        a.set_xticks(steps, map(str, steps))
        a.minorticks_off()
    return figure_svg(figure)


def _steps_text(figures: dict[str, Any]) -> str:
    errors, rates, latency = figures["chunk_error"], figures["success_by_steps"], figures["latency_ms_a_call"]
    head = "<tr><th>Euler steps<th>success<th>95 % interval<th>ms a call"
    head += "<th>RMS error to the expert<th>to the exact flow" if errors else ""
    rows = []
    for s in sorted(rates):
        cells = f"<td>{s}<td>{_percent(rates[s])}<td>{rates[s]['low']:.1%} to {rates[s]['high']:.1%}"
        cells += f"<td>{latency[s]:.0f}"
        cells += f"<td>{errors[s]['to_expert']:.4f}<td>{errors[s]['to_exact']:.4f}" if errors else ""
        rows.append(f"<tr>{cells}")
    calls = f"One call makes {figures['batch_size']} chunks; images, tokens and transfers included."
    return f"<table>{head}{''.join(rows)}</table><p>{calls}</p>"


def _denoising_plot(points: np.ndarray, names: tuple[str, ...]) -> bytes:
    shown = np.unique(np.linspace(0, len(points) - 1, min(6, len(points))).astype(int))
    figure, axes = new_figure(len(shown), height=2.4, sharey=True)
    for a, i in zip(axes, shown, strict=True):
        for name, values in zip(names, points[i].T, strict=True):
            a.plot(np.arange(1, len(values) + 1), values, marker=".", label=name)
        a.set_title(f"t = {1 - i / (len(points) - 1):.1f}", fontsize=10)
        a.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        a.set_xlabel("step")
    axes[0].legend(frameon=False, fontsize=8)
    return figure_svg(figure)


def _loss_plot(metrics: list[dict[str, float]]) -> bytes:
    figure, axes = new_figure(2)
    train = [(row["step"], row["loss"], row.get("grad_norm")) for row in metrics if "loss" in row]
    step, loss, norm = (np.array(column, float) for column in zip(*train, strict=True))
    axes[0].plot(step, loss, color=BLUE, alpha=0.25, linewidth=0.6)
    window = max(1, len(loss) // 60)
    if len(loss) > window:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes[0].plot(step[window - 1 :], smooth, color=BLUE, label="training")
    held_out = [(row["step"], row["validation_loss"]) for row in metrics if "validation_loss" in row]
    if held_out:
        axes[0].plot(*zip(*held_out, strict=True), color=ORANGE, marker="o", markersize=3, label="held out")
    axes[0].set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes[0].legend(frameon=False)
    axes[1].plot(step, norm, color=GREY, linewidth=0.6)
    axes[1].set(xlabel="step", ylabel="gradient norm", yscale="log")
    return figure_svg(figure)


def _training_text(train: TrainConfig | None, metrics: list[dict[str, float]]) -> str:
    if train is None:
        return ""
    settings = {
        "steps": train.num_steps,
        "batch": train.batch_size,
        "optimizer": train.optim.name,
        "peak learning rate": train.optim.peak_lr,
        "flow": json.dumps(dataclasses.asdict(train.flow)),
        "seed": train.seed,
    }
    return "<table>" + "".join(f"<tr><th>{k}<td>{html.escape(str(v))}" for k, v in settings.items()) + "</table>"


def _videos(outcomes: Sequence[Outcome], fps: int) -> str:
    parts = []
    for outcome in outcomes:
        if outcome.pictures:
            video = _data(encode_mp4(outcome.pictures, fps), "video/mp4")
            result = f"done in {outcome.num_steps} steps" if outcome.success else "failed"
            parts.append(
                f'<figure><video src="{video}" autoplay loop muted playsinline controls></video>'
                f"<figcaption>“{html.escape(outcome.prompt)}”: {result}</figcaption></figure>"
            )
    return f'<div class="videos">{"".join(parts)}</div>'


def encode_mp4(pictures: Sequence[np.ndarray], fps: int, hold_seconds: float = 1.0) -> bytes:
    """Pictures as an mp4 that browsers play; the last one stays for a moment."""
    pictures = [*pictures, *[pictures[-1]] * round(hold_seconds * fps)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = VideoWriter(path, pictures[0].shape[:2], fps, "yuv420p", 20)
        writer.write(np.stack(pictures))
        writer.close()
        return path.read_bytes()


def new_figure(panels: int, height: float = 3.2, sharey: bool = False):
    """A figure with panels side by side, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels, sharey=sharey))
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_svg(figure) -> bytes:
    """The figure as SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
