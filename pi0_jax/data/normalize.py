"""Normalisation of states and actions, with openpi's formulas and file format.

    zscore      y = (x - mean) / (std + 1e-6)
    quantile    y = (x - q01) / (q99 - q01 + 1e-6) * 2 - 1        nothing is clipped

Two departures keep nearly constant dimensions bounded. Both need `min` and `max`, which openpi's files lack: with
those files the formulas are exactly openpi's. With range = max - min over the demonstrations,

* the divisor is at least 1 % of the range, so no demonstration lies further out than about 200. It changes only
  dimensions whose range is 100 times their spread, such as a gripper that moved in one frame of ten thousand.
* a dimension of range below 1e-6 is constant: any value normalises to what the constant normalises to, and anything
  unnormalises to the constant. A robot that stands elsewhere later does not produce values of a million.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from pi0_jax.data.lerobot import ACTION, STATE, VALID, LeRobotDataset

EPSILON = 1e-6
RANGE_SHARE = 0.01

Mode = Literal["zscore", "quantile"]
Values = Float[np.ndarray, "*b d"]


class NormStats(NamedTuple):
    """Statistics of a vector over the demonstrations, each float64 `[d]`, in the robot's units."""

    mean: Float[np.ndarray, "d"]
    std: Float[np.ndarray, "d"]
    q01: Float[np.ndarray, "d"] | None = None
    """1 % quantile."""
    q99: Float[np.ndarray, "d"] | None = None
    """99 % quantile."""
    min: Float[np.ndarray, "d"] | None = None
    max: Float[np.ndarray, "d"] | None = None


Stats = dict[str, NormStats]
"""`state` and `actions`."""


class Affine(NamedTuple):
    """A normalisation as raw = scale * normalised + offset. `scale` is 0 for constant dimensions."""

    scale: Float[np.ndarray, "d"]
    offset: Float[np.ndarray, "d"]


def compute_stats(dataset: LeRobotDataset) -> Stats:
    """Statistics over all frames, exactly, from the parquet columns alone.

    Actions of frames marked invalid (column `valid` 0) are left out.

    Raises:
        ValueError: a value is not finite, or no action is valid.
    """
    actions = dataset.columns(ACTION)
    if VALID in dataset.features:
        actions = actions[dataset.columns(VALID)[:, 0] > 0]
        if not len(actions):
            raise ValueError(f"{dataset.root}: column {VALID!r} is 0 in all frames, so no action is left to learn.")
    return {"state": _vector_stats(dataset.columns(STATE), STATE), "actions": _vector_stats(actions, ACTION)}


def affine(stats: NormStats, mode: Mode) -> Affine:
    """The normalisation of `mode` as one affine map.

    Raises:
        ValueError: `mode` is quantile and there are no quantiles.
    """
    low, divisor = _low_and_divisor(stats, mode)
    return Affine(divisor, low) if mode == "zscore" else Affine(divisor / 2, low + divisor / 2)


def normalize_values(x: Values, stats: NormStats, mode: Mode) -> Values:
    """Robot units to normalised ones, float64."""
    low, divisor = _low_and_divisor(stats, mode)
    y = (x - low) / np.where(divisor == 0, np.inf, divisor)
    return y if mode == "zscore" else y * 2.0 - 1.0


def unnormalize_values(y: Values, stats: NormStats, mode: Mode) -> Values:
    """Normalised units to the robot's, float64: the inverse of `normalize_values`."""
    low, divisor = _low_and_divisor(stats, mode)
    return y * divisor + low if mode == "zscore" else (y + 1.0) / 2.0 * divisor + low


def check_stats(stats: Stats, names: dict[str, tuple[str, ...]]) -> None:
    """Checks that statistics belong to a robot.

    Args:
        stats: the statistics.
        names: names of the robot's dimensions, for `state` and for `actions`.

    Raises:
        ValueError: statistics are missing, or have another number of dimensions.
    """
    for key, dims in names.items():
        if key not in stats:
            raise ValueError(f"normalisation statistics lack {key!r}; they have {sorted(stats)}.")
        if len(stats[key].mean) != len(dims):
            raise ValueError(
                f"normalisation statistics of {key!r} have {len(stats[key].mean)} dimensions; the robot has "
                f"{len(dims)}: {', '.join(dims)}. Compute them from this robot's demonstrations."
            )


def stats_to_json(stats: Stats) -> dict[str, Any]:
    """The JSON object of openpi's `norm_stats.json`; `min` and `max` are added where known."""
    keep = ("mean", "std", "q01", "q99")
    entries = {
        key: {
            field: None if value is None else value.tolist()
            for field, value in entry._asdict().items()
            if value is not None or field in keep
        }
        for key, entry in stats.items()
    }
    return {"norm_stats": entries}


def stats_from_json(content: dict[str, Any]) -> Stats:
    """Statistics from the JSON object of a `norm_stats.json`, ours or openpi's.

    Raises:
        ValueError: something is missing, not finite, or of unequal length.
    """
    if "norm_stats" not in content:
        raise ValueError(f"normalisation statistics have keys {sorted(content)}; expected one called 'norm_stats'.")
    stats = {}
    for key, entry in content["norm_stats"].items():
        if missing := [field for field in ("mean", "std") if entry.get(field) is None]:
            raise ValueError(f"normalisation statistics of {key!r} lack {missing}; they have {sorted(entry)}.")
        fields = {name: np.array(entry[name], np.float64) for name in NormStats._fields if entry.get(name) is not None}
        stats[key] = NormStats(**fields)
        _check_finite(stats[key], key)
    return stats


def load_stats(path: str | os.PathLike[str]) -> Stats:
    """Reads a `norm_stats.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path}; expected normalisation statistics.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected openpi's norm_stats.json.") from error
    return stats_from_json(content)


def save_stats(stats: Stats, path: str | os.PathLike[str]) -> None:
    """Writes a `norm_stats.json`, which openpi reads too."""
    Path(path).write_text(json.dumps(stats_to_json(stats), indent=2))


def _vector_stats(values: np.ndarray, name: str) -> NormStats:
    x = values.astype(np.float64)
    if (bad := ~np.isfinite(x).all(1)).any():
        raise ValueError(f"column {name!r} holds NaN or infinity in {bad.sum()} frames. Record it again without them.")
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    return NormStats(x.mean(0), x.std(0), q01, q99, x.min(0), x.max(0))


def _low_and_divisor(stats: NormStats, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted and what is divided by; the divisor is 0 for constant dimensions."""
    if mode == "zscore":
        low, divisor = stats.mean, stats.std + EPSILON
    elif stats.q01 is None or stats.q99 is None:
        raise ValueError("quantile normalisation needs q01 and q99, and these statistics have none. Use 'zscore'.")
    else:
        low, divisor = stats.q01, stats.q99 - stats.q01 + EPSILON
    if stats.min is None or stats.max is None:
        return low, divisor
    spread = stats.max - stats.min
    return low, np.where(spread < EPSILON, 0.0, np.maximum(divisor, RANGE_SHARE * spread))


def _check_finite(stats: NormStats, key: str) -> None:
    for field, value in stats._asdict().items():
        if value is None:
            continue
        if value.shape != stats.mean.shape or value.ndim != 1:
            raise ValueError(
                f"{field} of {key!r} has shape {value.shape}, its mean {stats.mean.shape}; expected one list of "
                "numbers of equal length."
            )
        if not np.isfinite(value).all():
            dims = np.flatnonzero(~np.isfinite(value)).tolist()
            raise ValueError(f"{field} of {key!r} is not finite in dimensions {dims}. Compute the statistics again.")
