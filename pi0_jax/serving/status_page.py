"""The status page: one HTML file without scripts or external resources. Everything from the network is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from pi0_jax.serving.metrics import OUTCOMES, Metrics

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999933")
MAX_SIDE = 320
"""Pixels of a camera frame on the page."""
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .3rem 0; } .muted { color: #666; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; font-weight: normal; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; } figcaption { color: #666; }
img { image-rendering: pixelated; min-width: 160px; }
svg { max-width: 100%; height: auto; } svg text { font-size: 11px; }
"""


def render(state: str, metadata: Mapping[str, Any], metrics: Metrics, clients: int, waiting: int) -> str:
    """The page, with the policy's metadata for clients, and the numbers of connections and of requests that wait."""
    recent = np.array(metrics.recent)
    title = f"Policy for {metadata.get('robot', 'a robot')}"
    counts = " · ".join(f"{metrics.outcomes[name]} {name}" for name in OUTCOMES if metrics.outcomes[name]) or "none yet"
    facts = {"state": state, "clients": clients, "waiting": waiting, "requests": counts}
    if recent.size:
        p50, p95, p99 = np.percentile(recent, [50, 95, 99])
        facts["latency"] = f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms over the last {recent.size}"
    rows = "".join(f"<tr><th>{name}</th><td>{_escape(value)}</td></tr>" for name, value in facts.items())
    sizes = sorted(metrics.batch_sizes)
    sections = [
        f"<h1>{_escape(title)}</h1><table>{rows}</table>",
        '<div class="row">',
        _figure("latency of the last answers, ms", latency_histogram(recent)),
        _figure("requests in a batch", bars([str(n) for n in sizes], [metrics.batch_sizes[n] for n in sizes])),
        "</div>",
        _last(metrics.last, metadata.get("actions", []), metrics.subtask),
        '<p class="muted">This page renews itself every 2 seconds. Metrics for Prometheus: /metrics.</p>',
    ]
    head = f"<meta charset='utf-8'><meta http-equiv='refresh' content='2'><title>{_escape(title)}</title>"
    body = "".join(sections)
    return f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>"


def latency_histogram(milliseconds: np.ndarray) -> str:
    """Histogram of latencies up to the 99.5th percentile; the last bar includes longer ones."""
    if not milliseconds.size:
        return bars([], [])
    top = max(float(np.percentile(milliseconds, 99.5)), 1e-3)
    counts, edges = np.histogram(np.minimum(milliseconds, top), bins=20, range=(0, top))
    return bars([f"{edge:.3g}" if i % 5 == 0 else "" for i, edge in enumerate(edges[:-1])], counts.tolist())


def bars(labels: Sequence[str], counts: Sequence[int], width: int = 420, height: int = 150) -> str:
    """A bar chart as SVG."""
    if not counts:
        return "<p class='muted'>nothing yet</p>"
    tallest, pitch, floor = max(*counts, 1), (width - 10) / len(counts), height - 18
    elements = [f"<svg viewBox='0 0 {width} {height}' width='{width}' role='img' aria-label='bar chart'>"]
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        tall, x = (floor - 16) * count / tallest, 5 + i * min(pitch, 80)
        elements.append(
            f"<rect x='{x:.1f}' y='{floor - tall:.1f}' width='{0.9 * min(pitch, 60):.1f}' height='{tall:.1f}' "
            f"fill='{COLOURS[0]}'><title>{count}</title></rect>"
            f"<text x='{x:.1f}' y='{height - 4}'>{_escape(label)}</text>"
        )
        if len(counts) <= 8:
            elements.append(f"<text x='{x:.1f}' y='{floor - tall - 4:.1f}'>{count}</text>")
    return "".join(elements) + "</svg>"


def chunk_plot(actions: np.ndarray, names: Sequence[str]) -> str:
    """A line plot of a chunk `[ah, d]` over its steps, as SVG, with the scale at the left."""
    width, height = 640, 220
    steps, dims = actions.shape
    low, high = float(min(actions.min(), 0)), float(max(actions.max(), 0))
    span = (high - low) or 1.0
    right, floor = width - 110, height - 20
    x = 60 + (right - 60) * np.arange(steps) / max(steps - 1, 1)
    elements = [f"<svg viewBox='0 0 {width} {height}' width='{width}' role='img' aria-label='last chunk'>"]
    for value in sorted({low, 0.0, high}):
        y = floor - (floor - 10) * (value - low) / span
        elements.append(f"<line x1='60' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#ddd'/>")
        elements.append(f"<text x='55' y='{y + 4:.1f}' text-anchor='end'>{value:.3g}</text>")
    for i in range(dims):
        y = floor - (floor - 10) * (actions[:, i] - low) / span
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        colour, dash = COLOURS[i % len(COLOURS)], "" if i < len(COLOURS) else " stroke-dasharray='5 3'"
        name = names[i] if i < len(names) else f"action {i}"
        elements.append(f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='1.6'{dash}/>")
        elements.append(f"<text x='{right + 8}' y='{18 + 13 * i}' fill='{colour}'>{_escape(name)}</text>")
    elements.append(
        f"<text x='60' y='{height - 4}'>1</text><text x='{right}' y='{height - 4}' text-anchor='end'>{steps}</text>"
    )
    return "".join(elements) + "</svg>"


def _last(last: tuple[Any, Any] | None, names: Sequence[str], subtask: str | None) -> str:
    if last is None:
        return ""
    observation, actions = last
    observation = getattr(observation, "observation", observation)
    observation = observation if isinstance(observation, Mapping) else {}
    images = observation.get("images", {})
    frames = "".join(_figure(str(name), _picture(image)) for name, image in images.items() if np.ndim(image) == 3)
    prompt = f"<p>{_escape(observation['prompt'])}</p>" if "prompt" in observation else ""
    prompt += "" if subtask is None else f"<p>subtask: {_escape(subtask or 'none')}</p>"
    shown = f"<h2>Last observation</h2>{prompt}<div class='row'>{frames}</div>" if frames or prompt else ""
    steps = f"{len(actions)} steps, in the robot's units"
    return f"{shown}<h2>Last chunk</h2>{_figure(steps, chunk_plot(np.asarray(actions), list(names)))}"


def _picture(image: np.ndarray) -> str:
    picture = PIL.Image.fromarray(np.asarray(image))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='camera frame' width='{picture.width}' src='data:image/png;base64,{data}'>"


def _figure(caption: str, content: str) -> str:
    return f"<figure>{content}<figcaption>{_escape(caption)}</figcaption></figure>"


def _escape(value: Any) -> str:
    return html.escape(str(value)[:500])
