"""Observations in files, and chunks of actions as tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax.errors import UserError, require_package

FORMATS = """an .npz with the arrays images/<camera>, state and prompt, or a .json
  {"images": {"<camera>": "<picture beside the file>", ...}, "state": [...], "prompt": "..."}"""

_LEGEND_ROWS = 18
"""Names below each other that fit into a plot."""


def load_observation(path: str | Path) -> dict[str, Any]:
    """Reads a raw observation.

    Args:
        path: an `.npz` with the arrays `images/<camera>`, `state` and `prompt`; or a `.json` with the same, where
            images are the names of picture files beside it.

    Raises:
        FileNotFoundError: no such file, or no such picture.
        ValueError: another format, or a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no observation {path}. Expected {FORMATS}")
    if path.suffix == ".npz":
        return _from_npz(path)
    if path.suffix == ".json":
        return _from_json(path)
    raise UserError(f"{path} is neither .npz nor .json. Expected {FORMATS}")


def _from_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # a zip or array error, of many types
        raise UserError(f"{path} cannot be read ({error}). Expected {FORMATS}") from error
    images = {name.removeprefix("images/"): arrays.pop(name) for name in list(arrays) if name.startswith("images/")}
    return {"images": images, **arrays}


def _from_json(path: Path) -> dict[str, Any]:
    import PIL.Image

    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Expected {FORMATS}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), dict):
        raise UserError(f"{path} lacks `images` by camera. Expected {FORMATS}")
    images = {}
    for camera, name in content["images"].items():
        picture = path.parent / str(name)
        if not picture.is_file():
            raise FileNotFoundError(f"{path} names {name!r} for camera {camera!r}, and there is no {picture}.")
        try:
            images[camera] = np.asarray(PIL.Image.open(picture).convert("RGB"))
        except OSError as error:
            raise UserError(f"{picture} is not a picture that can be read ({error}).") from error
    return {**content, "images": images}


def save_observation(path: str | Path, observation: dict[str, Any]) -> None:
    """Writes a raw observation as `.npz`, in the form that `load_observation` reads."""
    arrays = {f"images/{camera}": image for camera, image in observation["images"].items()}
    np.savez(path, **arrays, state=observation["state"], prompt=np.array(observation["prompt"]))


def plot_chunk(actions: np.ndarray, names: tuple[str, ...], path: str | Path, title: str) -> None:
    """Draws a chunk `[ah, d]`, one line per dimension, and saves the picture; it is as wide as its legend needs."""
    require_package("matplotlib", "report", "plotting a chunk")
    from matplotlib.figure import Figure

    columns = -(-len(names) // _LEGEND_ROWS)
    legend = columns * (0.6 + 0.08 * max(map(len, names)))  # inches: a sample of the line, and letters
    figure = Figure(figsize=(5.6 + legend, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(actions) + 1)
    for i, (name, values) in enumerate(zip(names, actions.T, strict=True)):
        style = ("-", "--", ":", "-.")[i // 10 % 4]  # there are ten colours
        axes.plot(steps, values, style, marker="o", markersize=3, label=name)
    axes.set(xlabel="step of the chunk", ylabel="action (robot units)", title=title)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=columns)
    figure.savefig(path, dpi=150)


def format_chunk(actions: np.ndarray, names: tuple[str, ...]) -> str:
    """A chunk `[ah, d]` as a text table."""
    width = max(9, *(len(name) + 1 for name in names))
    lines = ["step" + "".join(f"{name:>{width}}" for name in names)]
    lines += [f"{i:>4}" + "".join(f"{value:>{width}.4f}" for value in row) for i, row in enumerate(actions, 1)]
    return "\n".join(lines)
