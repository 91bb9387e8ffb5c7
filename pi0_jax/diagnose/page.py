"""What was measured as one HTML file."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from pi0_jax.data.tools.show import small_plots
from pi0_jax.diagnose.figures import Figures, Use
from pi0_jax.diagnose.findings import THRESHOLDS, Finding
from pi0_jax.diagnose.run import Evidence, Moment
from pi0_jax.evaluate.page import BLUE, GREY, ORANGE, bars, figure_svg, new_figure, page, picture_tag, svg_tag, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 192
"""Least side of a picture, pixels."""
PHASES = ("start", "middle", "end")
ICONS = {"act": "▲", "unclear": "?", "good": "✓"}


def diagnosis_page(
    title: str, figures: Figures, evidence: Evidence, found: Sequence[Finding], names: Sequence[str], footer: str
) -> str:
    """The page.

    Args:
        title: of the page.
        figures, evidence: what was measured.
        found: what it means.
        names: of the action dimensions.
        footer: HTML.
    """
    f = figures
    count = sum(finding.kind == "act" for finding in found)
    share = f"<b>{max(f.skill, 0):.0%}</b> of the variance of held-out actions explained"
    lead = (
        f"{share}; error {f.error:.3f}, the average "
        f"action’s {f.average_error:.3f}. {count} things to mend, <a href='#findings'>at the end</a>."
    )
    about = (
        f"{f.chunks} chunks of {f.episodes} held-out episodes, one every {f.every} frames; the policy sees the "
        "demonstration’s pictures and states at each. Errors are root mean squares of normalised actions, unless "
        "units are given. Intervals are 95 %, by bootstrap over episodes."
    )
    sections = [
        ("What was looked at", None, f"<p>{about}</p>"),
        ("What the policy uses", _uses_plot(f.uses) if f.uses else None, _uses_text(f)),
        ("Error by step of the chunk, and by part of the episode", _course_plot(f), ""),
        ("Dimensions", None, _dimensions(f)),
        ("An episode as it would be executed", *_episode(evidence, names)),
        ("Smoothness and grippers", None, _motion(f)),
        ("Worst moments", None, "".join(_moment(evidence, moment, names) for moment in evidence.moments)),
        ("Pictures beside those of training", None, _nearness(f)),
        ('<span id="findings">What to do</span>', None, _findings(found)),
    ]
    return page(title, lead, sections, footer)


def _uses_plot(uses: Sequence[Use]) -> bytes:
    figure, (axes,) = new_figure(height=0.42 * len(uses) + 0.9)
    values = [(use.increase.value, use.increase.low, use.increase.high) for use in uses]
    bars(axes, [_label(use) for use in uses], values, 100.0)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.axvline(100 * THRESHOLDS.unused, color=ORANGE, linewidth=0.8, linestyle="--")
    axes.set_xlabel("more error without it, %; dashed: below it is not used")
    return figure_svg(figure)


def _label(use: Use) -> str:
    return f"camera {use.name}, {use.how}" if use.kind == "camera" else f"{use.kind}: {use.how}"


def _uses_text(f: Figures) -> str:
    rows = [
        (
            _label(use),
            f"{use.error:.3f}",
            f"{use.increase.value:+.1%}",
            f"{use.increase.low:+.1%} to {use.increase.high:+.1%}",
            f"{use.change:.2f}",
        )
        for use in f.uses
    ]
    head = ("taken away", "error", "more error", "95 % interval", "change of the chunks / plain error")
    text = f"Each from the same noise as the plain chunks, whose error is {f.error:.3f}. "
    text += "An instruction that says the same in other words counts as another one. "
    text += " ".join(f"Not tried: {kind}, as {reason}." for kind, reason in f.not_tried.items())
    found = f"{table(head, rows)}<p>{html.escape(text)}</p>"
    if f.attention:
        shares = table(
            ("attention of the action tokens to", "share"), [(k, f"{v:.1%}") for k, v in f.attention.items()]
        )
        found += f"{shares}<p>Mean over layers, heads and tokens in the first solver step.</p>"
    return found


def _course_plot(f: Figures) -> bytes:
    figure, (steps, phases) = new_figure(2, sharey=True)
    steps.plot(range(1, len(f.horizon) + 1), f.horizon, color=BLUE, marker=".")
    steps.axvline(f.execute_steps, color=GREY, linewidth=0.8, linestyle="--")
    steps.set(xlabel="step of the chunk; dashed: the last one executed", ylabel="error")
    steps.set_ylim(bottom=0)
    phases.bar(PHASES, [error or 0 for error in f.phases], color=BLUE)
    phases.set_xlabel("third of the episode")
    return figure_svg(figure)


def _dimensions(f: Figures) -> str:
    rows = [
        (
            d.name,
            "–" if d.error is None else f"{d.error:.4g}",
            "constant" if d.skill is None else f"{d.skill:.0%}",
        )
        for d in f.dimensions
    ]
    return table(("dimension", "error, robot units", "variance explained"), rows)


def _episode(evidence: Evidence, names: Sequence[str]) -> tuple[bytes, str]:
    """The episode of median error: its chunks, each as far as it is executed."""
    chunks = evidence.chunks
    count = len(chunks.lengths)
    means = np.bincount(chunks.episode, evidence.errors, count) / np.bincount(chunks.episode, minlength=count)
    chosen = int(np.argsort(means)[count // 2])
    rows = np.flatnonzero(chunks.episode == chosen)
    figure, axes = _curves(names)
    length = int(chunks.lengths[chosen])
    for i, axis in enumerate(axes):
        demonstrated = evidence.expert[rows, : chunks.every, i].ravel()[:length]
        axis.plot(range(length), demonstrated, color=ORANGE, linewidth=1)
        for row in rows.tolist():
            end = min(chunks.every, length - int(chunks.step[row]))
            axis.plot(chunks.step[row] + np.arange(end), evidence.predicted[row, :end, i], color=BLUE, linewidth=1)
    text = f"{chunks.names[chosen]}, of median error, over frames: demonstrated in orange; in blue the policy’s chunks."
    return figure_svg(figure), f"<p>{html.escape(text)}</p>"


def _motion(f: Figures) -> str:
    def ratio(value: float | None) -> str:
        return "too little to say" if value is None else f"{value:.2f} times the demonstrations’"

    rows = [
        ("jitter within chunks (second differences)", ratio(f.roughness.jitter)),
        ("step from a chunk’s last executed action to the next chunk’s first", ratio(f.roughness.seams)),
    ]
    found = table((), rows)
    if f.switches:
        rows = [
            (s.name, s.motion, s.count, s.found, s.own)
            + (
                ("–", "–")
                if s.delay is None
                else (f"{s.delay.value:+.3g}", f"{s.delay.low:+.3g} to {s.delay.high:+.3g}")
            )
            for s in f.switches
        ]
        head = (
            "gripper",
            "",
            "times",
            "found near then",
            "by the policy in all",
            "median delay, frames",
            "95 % interval",
        )
        found += table(head, rows) + "<p>closes: away from where most episodes begin; opens: back.</p>"
    return found


def _moment(evidence: Evidence, moment: Moment, names: Sequence[str]) -> str:
    chunks, i = evidence.chunks, moment.number
    title = f"{chunks.names[chunks.episode[i]]}, frame {chunks.step[i]}: “{chunks.prompts[i]}”"
    wrote = "" if moment.subtask is None else f" The policy wrote the subtask “{html.escape(moment.subtask)}”."
    seen = {camera: np.asarray(images[i]) for camera, images in chunks.observation.images.items()}
    pictures = [
        picture_tag(_enlarged(picture), f"camera {camera}")
        + (picture_tag(_overlaid(picture, moment.attention[camera]), "attention") if moment.attention else "")
        for camera, picture in seen.items()
    ]
    near = [
        picture_tag(_enlarged(picture), f"training: {each.caption}" if k == 0 else f"the same, camera {camera}")
        for each in moment.neighbours
        for k, (camera, picture) in enumerate(each.pictures.items())
    ]
    figure, axes = _curves(names)
    steps = np.flatnonzero(chunks.valid[i])
    for dim, axis in enumerate(axes):
        axis.plot(steps + 1, evidence.expert[i, steps, dim], color=ORANGE, linewidth=1.2, marker=".")
        axis.plot(np.arange(chunks.valid.shape[1]) + 1, evidence.predicted[i, :, dim], color=BLUE, linewidth=1.2)
    return (
        f"<h3>{html.escape(title)}</h3><p>Error {evidence.errors[i]:.3f}. Steps of the chunk: demonstrated in orange, "
        f"predicted in blue.{wrote}</p>{svg_tag(figure_svg(figure), title)}"
        f'<div class="videos">{"".join(pictures + near)}</div>'
    )


def _nearness(f: Figures) -> str:
    if f.nearness is None:
        return "<p>The training data were not there to compare with.</p>"
    near = f.nearness
    rows = [
        ("training frames looked at", near.frames),
        ("distance to the nearest, over that of training frames to other episodes’", f"{near.ratio:.2f}"),
        ("rank correlation of that distance with the error", f"{near.correlation:+.2f}"),
        ("error on training frames", "–" if f.training_error is None else f"{f.training_error:.3f}"),
        ("error on held-out frames", f"{f.error:.3f}"),
    ]
    text = (
        "Distance of the mean image tokens of each camera (of the state, without cameras), in deviations over training."
    )
    return f"{table((), rows)}<p>{text}</p>"


def _findings(found: Sequence[Finding]) -> str:
    lines = "".join(
        f"<li><b>{ICONS[x.kind]} {html.escape(x.sentence)}</b> {html.escape(x.figure)}."
        f"{f'<br>{html.escape(x.advice)}' if x.advice else ''}</li>"
        for x in found
    )
    limits = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(THRESHOLDS).items())
    return f"<ul style='list-style: none; padding: 0'>{lines}</ul><p>Thresholds: {limits}.</p>"


def _curves(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with one small plot per dimension."""
    figure, axes = small_plots(names, width=9.0, height=1.5, font=8)
    figure.set_figheight(figure.get_figheight() + 0.2)
    for axis in axes:
        axis.locator_params(axis="y", nbins=4)
    return figure, axes


def _enlarged(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "_h _w 3"]:
    factor = -(-SIDE // picture.shape[0])
    return np.repeat(np.repeat(picture, factor, 0), factor, 1)


def _overlaid(picture: UInt8[np.ndarray, "h w 3"], shares: Float[np.ndarray, "y x"]) -> UInt8[np.ndarray, "_h _w 3"]:
    """The picture in grey with the attention in red over it, relative to its largest patch."""
    picture = _enlarged(picture)
    heat = PIL.Image.fromarray((255 * shares / max(shares.max(), 1e-12)).astype(np.uint8))
    weight = np.asarray(heat.resize(picture.shape[1::-1], PIL.Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    return ((1 - 0.7 * weight) * grey + 0.7 * weight * np.array([255, 40, 0], np.float32)).astype(np.uint8)
