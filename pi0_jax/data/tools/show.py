"""One HTML file of a dataset: a contact sheet, histograms of states and actions, and curves of some episodes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from pi0_jax.atomic import written
from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.source import ACTION, STATE, Source
from pi0_jax.data.transform import resize_with_pad
from pi0_jax.errors import require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = 8
"""Pictures of each episode and camera."""
THUMBNAIL, GAP = 128, 4
"""Side of a picture on the contact sheet, and the white between two of them, pixels."""
TASKS = 20
"""Instructions that are listed."""
COLUMNS = 4
"""Histograms or curves side by side."""
HISTOGRAM_FRAMES = 100_000


def show(datasets: Sequence[OpenDataset], output: Path, episodes: int, rerun: Path | None = None) -> None:
    """Writes the page.

    `episodes` are drawn, evenly over the dataset, and written to the Rerun recording `rerun` too, if there is one.

    Raises:
        UserError: a frame cannot be read; matplotlib, or Rerun if requested, is not installed.
        OSError: the file cannot be written.
    """
    require_package("matplotlib", "report", "pi0 data show")
    body = "".join(_section(dataset, episodes) for dataset in datasets)
    style = (
        "body{font:14px sans-serif;margin:2em;max-width:1200px}img{max-width:100%}"
        "td,th{padding:2px 8px;vertical-align:top}th{text-align:left;white-space:nowrap}"
    )
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(output.stem)}</title><style>{style}</style>{body}"
    with written(output) as partial:
        partial.write_text(page, encoding="utf-8")
    if rerun is not None:
        _log_to_rerun(datasets, episodes, rerun)


def _chosen(source: Source, episodes: int) -> list[int]:
    return np.unique(np.linspace(0, source.num_episodes - 1, min(episodes, source.num_episodes)).astype(int)).tolist()


def _section(dataset: OpenDataset, episodes: int) -> str:
    source, robot = dataset.source, dataset.robot
    lengths = source.lengths
    facts = {
        "robot": robot.name,
        "episodes": source.num_episodes,
        "frames": source.num_frames,
        "frames per second": f"{source.fps:g}",
        "length of episodes": f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):g}",
        "cameras": ", ".join(f"{key} {source.features[key]['shape']}" for key in source.cameras),
        "prompts": len(source.tasks),
        "annotations": ", ".join(f"{count} of {kind}" for kind, count in source.annotations().items()) or "none",
    }
    rows = "".join(f"<tr><th>{k}<td>{html.escape(str(v))}" for k, v in facts.items())
    counts = np.bincount(source.task_index, minlength=len(source.tasks))
    tasks = "".join(
        f"<li>{html.escape(source.tasks[i]) or '<b>no text</b>'} ({counts[i]} frames)"
        for i in np.argsort(-counts)[:TASKS]
    )
    if len(source.tasks) > TASKS:
        tasks += f"<li>and {len(source.tasks) - TASKS} more"
    sections = [f"<h1>{html.escape(str(source.root))}</h1><table>{rows}</table><h2>Prompts</h2><ul>{tasks}</ul>"]
    for key, feature, names in (("States", STATE, robot.state), ("Actions", ACTION, robot.actions)):
        values = source.columns(feature)
        values = values[:: -(-len(values) // HISTOGRAM_FRAMES)]
        sections.append(f"<h2>{key}</h2>{_histograms(values, names)}")
    for episode in _chosen(source, episodes):
        first, end = source.episode_range(episode)
        title = f"{source.episodes[episode]}: {source.task(first)}, {end - first} frames"
        words = _prompts(source, first, end)
        pictures = _sheet(source, first, end)
        sections.append(f"<h2>{html.escape(title)}</h2>{words}{pictures}{_curves(dataset, first, end)}")
    return "".join(sections)


def _prompts(source: Source, first: int, end: int) -> str:
    """The prompts of an episode that has several, with the second at which each begins."""
    index = source.task_index[first:end]
    begin = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist()]
    lines = [f"{i / source.fps:.1f} s: {html.escape(source.tasks[index[i]])}" for i in begin]
    return f"<p>{'<br>'.join(lines)}</p>" if len(begin) > 1 else ""


def _sheet(source: Source, first: int, end: int) -> str:
    if not source.cameras:
        return ""
    rows = np.unique(np.linspace(first, end - 1, PICTURES).astype(int))
    pictures = np.stack([resize_with_pad(source.images(camera, rows), THUMBNAIL) for camera in source.cameras])
    gaps = np.pad(pictures, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    lines, columns, height, width, _ = gaps.shape
    sheet = gaps.transpose(0, 2, 1, 3, 4).reshape(lines * height, columns * width, 3)
    buffer = io.BytesIO()
    PIL.Image.fromarray(sheet).save(buffer, "jpeg", quality=85)
    cameras = ", ".join(source.cameras)
    text = f"From the first frame to the last; rows: {html.escape(cameras)}"
    return f"<p>{text}</p>{_embedded(buffer.getvalue(), 'jpeg', cameras)}"


def _histograms(values: np.ndarray, names: Sequence[str]) -> str:
    figure, axes = small_plots(_labels(names, values))
    for axis, column in zip(axes, values.T, strict=True):
        axis.hist(column, bins=60, color="tab:blue")
        for quantile in np.quantile(column, [0.01, 0.99]):
            axis.axvline(quantile, color="tab:red", linewidth=0.8)
        axis.set_yticks([])
    return _figure(figure, "histograms; lines are the 1 % and 99 % quantiles")


def _curves(dataset: OpenDataset, first: int, end: int) -> str:
    """States in blue and actions in orange over seconds; those of one name together."""
    source, robot, seconds = dataset.source, dataset.robot, np.arange(end - first) / dataset.source.fps
    lines: dict[str, dict[str, np.ndarray]] = {}
    for color, feature, names in (("tab:blue", STATE, robot.state), ("tab:orange", ACTION, robot.actions)):
        values = source.columns(feature)[first:end]
        for name, column in zip(_labels(names, values), values.T, strict=True):
            lines.setdefault(name, {})[color] = column
    figure, axes = small_plots(list(lines))
    for axis, curves in zip(axes, lines.values(), strict=True):
        for color, column in curves.items():
            axis.plot(seconds, column, color=color, linewidth=1)
        axis.locator_params(axis="y", nbins=4)
    return f"<p>Over seconds: states blue, actions orange</p>{_figure(figure, 'states and actions')}"


def _labels(names: Sequence[str], values: np.ndarray) -> list[str]:
    """A name for each column, whatever the robot calls them."""
    return [names[i] if i < len(names) else str(i) for i in range(values.shape[1])]


def small_plots(
    titles: Sequence[str], width: float = 11.5, height: float = 1.8, font: int = 9
) -> tuple[Figure, list[Axes]]:
    """A figure with one small plot for each title. `width` of the figure and `height` of a row are in inches."""
    from matplotlib.figure import Figure

    lines = -(-len(titles) // COLUMNS)
    figure = Figure(figsize=(width, height * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel().tolist()
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=font)
        axis.tick_params(labelsize=font - 2)
        axis.locator_params(axis="x", nbins=4)
    return figure, axes[: len(titles)]


def _figure(figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return _embedded(buffer.getvalue(), "png", text)


def _embedded(content: bytes, kind: str, text: str) -> str:
    return f'<p><img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _log_to_rerun(datasets: Sequence[OpenDataset], episodes: int, path: Path) -> None:
    rerun: Any = require_package("rerun", "viz", "a Rerun recording")
    rerun.init("pi0_jax")
    rerun.save(str(path))
    for dataset in datasets:
        source, robot = dataset.source, dataset.robot
        for episode in _chosen(source, episodes):
            base = [*source.root.absolute().parts[-2:], source.episodes[episode]]  # lists: Rerun escapes their parts
            for number, row in enumerate(range(*source.episode_range(episode))):
                rerun.set_time("time", duration=number / source.fps)
                for camera in source.cameras:
                    rerun.log([*base, camera], rerun.Image(source.image(row, camera)))
                for feature, names in ((STATE, robot.state), (ACTION, robot.actions)):
                    for name, value in zip(names, source.columns(feature)[row].tolist(), strict=True):
                        rerun.log([*base, feature, name], rerun.Scalars(value))
    rerun.disconnect()  # completes the file
