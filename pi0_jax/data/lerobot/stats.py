"""Statistics in a LeRobot dataset's metadata.

Quantiles are those of the dataset here; lerobot stores the mean of each episode's quantiles.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from pi0_jax.data.lerobot.layout import read_column

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
STATS_FRAMES, STATS_PIXELS = 100, 150
"""Image statistics look at so many frames of an episode at most, and at so many rows and columns of each."""


def column_stats(values: np.ndarray) -> dict[str, list[Any]]:
    """Statistics of rows, `[n, d]`."""
    x = values.astype(np.float64)
    moments = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0), "count": np.array([len(x)])}
    quantiles = dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0), strict=True))
    return {key: value.tolist() for key, value in (moments | quantiles).items()}


def stored_column_stats(files: list[Path], name: str, shape: tuple[int, ...]) -> dict[str, list[Any]]:
    """Statistics of a column over several data files."""
    return column_stats(np.concatenate([read_column(path, name, shape) for path in files]))


def histogram(images: UInt8[np.ndarray, "n h w 3"]) -> tuple[Int[np.ndarray, "3 256"], int]:
    """How often each value occurs in a regular sample of the pixels, by channel, and the frames looked at."""
    frames = images[:: math.ceil(len(images) / STATS_FRAMES)]
    stride = math.ceil(max(images.shape[1:3]) / STATS_PIXELS)
    pixels = frames[:, ::stride, ::stride].reshape(-1, 3)
    return np.stack([np.bincount(channel, minlength=256) for channel in pixels.T]), len(frames)


def image_stats(counts: Int[np.ndarray, "3 256"], count: int) -> dict[str, list[Any]]:
    """Statistics in [0, 1] by channel, shaped (3, 1, 1) as lerobot shapes them."""
    values, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    cumulative = counts.cumsum(1)

    def at(share: int | float) -> np.ndarray:
        return values[(cumulative >= np.maximum(1, share * total)[:, None]).argmax(1)]

    stats = {"min": at(0), "max": at(1), "mean": mean, "std": std}
    quantiles = {key: at(share) for key, share in QUANTILES.items()}
    shaped = {key: value.reshape(3, 1, 1).tolist() for key, value in (stats | quantiles).items()}
    return {**{key: shaped[key] for key in stats}, "count": [count], **{key: shaped[key] for key in quantiles}}


def merge_stats(
    files: list[Path], features: dict[str, dict[str, Any]], cameras: list[str], pieces: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of `meta/stats.json` for datasets that were put together.

    Columns are read again, so that theirs are exact. Pictures are not: mean and range follow from the pieces', the
    deviation too, and quantiles are the pieces' mean, weighted, which is what lerobot stores for every feature.
    `pieces` are the `meta/stats.json` of each dataset.
    """
    stats = {}
    for name, feature in features.items():
        if name not in cameras:
            stats[name] = stored_column_stats(files, name, tuple(feature["shape"]))
            continue
        entries = [{key: np.array(value) for key, value in piece[name].items()} for piece in pieces]
        counts = np.array([entry["count"][0] for entry in entries], np.float64)
        weights = counts / counts.sum()

        def mean(key: str) -> np.ndarray:
            return np.sum([weight * entry[key] for weight, entry in zip(weights, entries, strict=True)], 0)

        square = np.sum([w * (e["std"] ** 2 + e["mean"] ** 2) for w, e in zip(weights, entries, strict=True)], 0)
        found = {"min": np.min([e["min"] for e in entries], 0), "max": np.max([e["max"] for e in entries], 0)}
        found |= {"mean": mean("mean"), "std": np.sqrt(np.maximum(square - mean("mean") ** 2, 0))}
        found |= {"count": np.array([int(counts.sum())])} | {key: mean(key) for key in QUANTILES}
        stats[name] = {key: value.tolist() for key, value in found.items()}
    return stats
