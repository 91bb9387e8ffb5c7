"""One HTML file of a dataset: a contact sheet, histograms of states and actions, and curves of some episodes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from pi0_jax.data.mixture import Part
from pi0_jax.data.partial import written
from pi0_jax.data.source import ACTION, STATE, Source
from pi0_jax.data.transform import resize_with_pad

PICTURES = 8
"""Pictures of each episode and camera."""
THUMBNAIL = 128
"""Side of a picture on the contact sheet, pixels."""
HISTOGRAM_FRAMES = 100_000


def show(parts: Sequence[Part], output: Path, episodes: int, rerun: Path | None = None) -> None:
    """Writes the page.

    Args:
        parts: the datasets.
        output: HTML file.
        episodes: how many to draw, evenly over the dataset.
        rerun: Rerun recording to write the same episodes to; None: none.

    Raises:
        ValueError: a frame cannot be read; Rerun is asked for and not installed.
        OSError: the file cannot be written.
    """
    body = "".join(_section(part, episodes) for part in parts)
    style = "body{font:14px sans-serif;margin:2em;max-width:1200px}img{max-width:100%}td,th{padding:2px 8px}"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(output.stem)}</title><style>{style}</style>{body}"
    with written(output) as partial:
        partial.write_text(page, encoding="utf-8")
    if rerun is not None:
        _log_to_rerun(parts, episodes, rerun)


def _chosen(source: Source, episodes: int) -> list[int]:
    return np.unique(np.linspace(0, source.num_episodes - 1, min(episodes, source.num_episodes)).astype(int)).tolist()


def _section(part: Part, episodes: int) -> str:
    source, robot = part.source, part.robot
    lengths = np.diff(source.ends, prepend=0)
    facts = {
        "robot": robot.name,
        "episodes": source.num_episodes,
        "frames": source.num_frames,
        "frames per second": f"{source.fps:g}",
        "length of episodes": f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):g}",
        "cameras": ", ".join(f"{key} {source.features[key]['shape']}" for key in source.cameras),
        "instructions": len(source.tasks),
    }
    rows = "".join(f"<tr><th align=left>{k}<td>{html.escape(str(v))}" for k, v in facts.items())
    counts = np.bincount(source.task_index, minlength=len(source.tasks))
    tasks = "".join(
        f"<li>{html.escape(source.tasks[i]) or '<b>no text</b>'} ({counts[i]} frames)" for i in np.argsort(-counts)[:20]
    )
    parts = [f"<h1>{html.escape(str(source.root))}</h1><table>{rows}</table><h2>Instructions</h2><ul>{tasks}</ul>"]
    for key, feature, names in (("States", STATE, robot.state), ("Actions", ACTION, robot.actions)):
        values = source.columns(feature)
        values = values[:: -(-len(values) // HISTOGRAM_FRAMES)]
        parts.append(f"<h2>{key}</h2>{_histograms(values, names)}")
    for episode in _chosen(source, episodes):
        first, end = source.episode_range(episode)
        title = f"{source.episodes[episode]}: {source.task(first)}, {end - first} frames"
        parts.append(f"<h2>{html.escape(title)}</h2>{_sheet(source, first, end)}{_curves(part, first, end)}")
    return "".join(parts)


def _sheet(source: Source, first: int, end: int) -> str:
    if not source.cameras:
        return ""
    rows = np.unique(np.linspace(first, end - 1, PICTURES).astype(int))
    strips = [np.concatenate(list(resize_with_pad(source.images(c, rows), THUMBNAIL)), 1) for c in source.cameras]
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.concatenate(strips)).save(buffer, "jpeg", quality=85)
    cameras = ", ".join(source.cameras)
    return f"<p>Rows: {html.escape(cameras)}</p>{_embedded(buffer.getvalue(), 'jpeg', cameras)}"


def _histograms(values: np.ndarray, names: Sequence[str]) -> str:
    from matplotlib.figure import Figure

    columns = 4
    lines = -(-values.shape[1] // columns)
    figure = Figure(figsize=(11, 1.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[values.shape[1] :]:
        axis.set_axis_off()
    for i in range(values.shape[1]):
        axes[i].hist(values[:, i], bins=60, color="tab:blue")
        for quantile in np.quantile(values[:, i], [0.01, 0.99]):
            axes[i].axvline(quantile, color="tab:red", linewidth=0.8)
        axes[i].set_title(names[i] if i < len(names) else str(i), fontsize=9)
        axes[i].tick_params(labelsize=7)
        axes[i].locator_params(axis="x", nbins=5)
        axes[i].set_yticks([])
    return _figure(figure, "histograms; lines are the 1 % and 99 % quantiles")


def _curves(part: Part, first: int, end: int) -> str:
    from matplotlib.figure import Figure

    source, seconds = part.source, np.arange(end - first) / part.source.fps
    lines = -(-max(len(part.robot.state), len(part.robot.actions)) // 3)
    figure = Figure(figsize=(11, 4 + 0.15 * lines), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, feature, names in (
        (axes[0], "state", STATE, part.robot.state),
        (axes[1], "action", ACTION, part.robot.actions),
    ):
        values = source.columns(feature)[first:end]
        for i in range(values.shape[1]):
            axis.plot(seconds, values[:, i], linewidth=1, label=names[i] if i < len(names) else str(i))
        axis.set(xlabel="seconds", title=key)
        axis.legend(fontsize=7, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return _figure(figure, "state and action")


def _figure(figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return _embedded(buffer.getvalue(), "png", text)


def _embedded(content: bytes, kind: str, text: str) -> str:
    return f'<p><img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _log_to_rerun(parts: Sequence[Part], episodes: int, path: Path) -> None:
    try:
        import rerun  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("a Rerun recording needs: pip install pi0_jax[viz]") from error
    rerun.init("pi0_jax")
    rerun.save(str(path))
    for part in parts:
        source = part.source
        for episode in _chosen(source, episodes):
            base = [*source.root.absolute().parts[-2:], source.episodes[episode]]  # lists: Rerun escapes their parts
            for number, row in enumerate(range(*source.episode_range(episode))):
                rerun.set_time("time", duration=number / source.fps)
                for camera in source.cameras:
                    rerun.log([*base, camera], rerun.Image(source.image(row, camera)))
                for feature, names in ((STATE, part.robot.state), (ACTION, part.robot.actions)):
                    for name, value in zip(names, source.columns(feature)[row].tolist(), strict=True):
                        rerun.log([*base, feature, name], rerun.Scalars(value))
    rerun.disconnect()  # completes the file
