"""Building blocks of reports: HTML pages of one file, with plots and videos inside."""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from pi0_jax.data.video import VideoWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, PALE, NAVY = "#2563eb", "#ea580c", "#6b7280", "#93c5fd", "#1e3a8a"
STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0 }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .2rem }}
.lead {{ font-size: 1.15rem; color: #374151 }} .lead b {{ font-size: 2.2rem; color: {BLUE} }}
img {{ width: 100%; max-width: 60rem }} figure {{ margin: 0 }} figcaption {{ font-size: .85rem; color: {GREY} }}
.videos {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }}
video {{ width: 100%; border-radius: 6px }} table {{ border-collapse: collapse; font-size: .9rem; margin: .6rem 0 }}
td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e5e7eb }}
footer {{ margin-top: 3rem; font-size: .85rem; color: {GREY} }}"""


def page(title: str, lead: str, sections: Iterable[tuple[str, bytes | None, str]], footer: str) -> str:
    """A page; its sections are (title, SVG or None, HTML)."""
    body = ""
    for head, picture, text in sections:
        body += f"<section><h2>{head}</h2>{svg_tag(picture, head) if picture else ''}<div>{text}</div></section>\n"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}
</style>
<h1>{html.escape(title)}</h1>
<p class="lead">{lead}</p>
{body}<footer>{footer}</footer></html>
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table of text; `head` may be empty."""

    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}" for cell in cells)

    return f"<table>{row(head, 'th') if head else ''}{''.join(row(cells, 'td') for cells in rows)}</table>"


def video_tag(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], fps: int, caption: str) -> str:
    """A video inside the page."""
    video = _data(encode_mp4(hold_last(pictures, fps), fps), "video/mp4")
    return (
        f'<figure><video src="{video}" autoplay loop muted playsinline controls></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def svg_tag(picture: bytes, text: str) -> str:
    """A plot inside the page; `text` for those who cannot see it."""
    return f'<img src="{_data(picture, "image/svg+xml")}" alt="{html.escape(text)}">'


def picture_tag(picture: UInt8[np.ndarray, "h w 3"], caption: str) -> str:
    """A picture inside the page."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, "jpeg", quality=88)
    image = f'<img src="{_data(buffer.getvalue(), "image/jpeg")}" alt="{html.escape(caption)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def hold_last(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], fps: int) -> list[np.ndarray]:
    """Pictures of an episode, whose last one stays for a second."""
    return [*pictures, *[pictures[-1]] * fps]


def encode_mp4(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], fps: int) -> bytes:
    """Pictures as an mp4 that browsers play."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = VideoWriter(path, pictures[0].shape[:2], fps, "yuv420p", 20)
        writer.write(np.stack(pictures))
        writer.close()
        return path.read_bytes()


def new_figure(panels: int = 1, height: float = 3.2, sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure with panels side by side, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels, sharey=sharey))
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_svg(figure: Figure) -> bytes:
    """The figure as SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def bars(axes: Any, names: Sequence[str], values: Sequence[tuple[float, float, float]], scale: float = 1.0) -> None:
    """Horizontal bars with intervals, the first at the top; a value is (mean, low, high)."""
    mean, low, high = scale * np.array(values[::-1]).T
    axes.barh([name.replace("_", " ") for name in names[::-1]], mean, color=PALE)
    spread = np.maximum([mean - low, high - mean], 0)
    axes.errorbar(mean, range(len(names)), xerr=spread, fmt="none", ecolor=NAVY, capsize=3)


def step_ticks(axes: Any, steps: Iterable[int]) -> None:
    """A logarithmic axis of numbers of steps, with a tick at each."""
    axes.set_xscale("log")
    axes.set_xticks([*steps], [str(n) for n in steps])
    axes.minorticks_off()


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
