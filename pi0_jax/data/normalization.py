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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pi0_jax.config.policy import Normalization as Mode
from pi0_jax.data.files import read_json
from pi0_jax.data.robots import Robot, semantics_of
from pi0_jax.errors import UserError

EPSILON = 1e-6
LARGEST = 10.0
"""Normalised values of demonstrations do not go beyond, by statistics that are computed here."""
RANGE_SHARE = 0.01

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


class Normalization(NamedTuple):
    """Statistics of a robot's states and actions, with the meaning of the actions that they were computed for."""

    stats: Stats
    semantics: tuple[str, ...]
    """One of `data.robots.SEMANTICS` per action dimension."""


class Affine(NamedTuple):
    """A normalisation as raw = scale * normalised + offset. `scale` is 0 for constant dimensions."""

    scale: Float[np.ndarray, "d"]
    offset: Float[np.ndarray, "d"]


def affine(stats: NormStats, mode: Mode) -> Affine:
    """The normalisation of `mode` as one affine map.

    Raises:
        UserError: `mode` is quantile and there are no quantiles.
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


def bounded(stats: NormStats) -> tuple[NormStats, list[int]]:
    """Statistics by which no demonstration is normalised to more than `LARGEST`, and the dimensions that this changed.

    Such are grippers that act in few frames, joints that hardly move, and spikes: their quantiles become their range,
    and their standard deviation what brings the furthest value to the bound.
    """
    assert stats.q01 is not None
    assert stats.q99 is not None
    assert stats.min is not None
    assert stats.max is not None
    varies = stats.max - stats.min >= EPSILON
    reach = np.maximum(stats.max - stats.mean, stats.mean - stats.min)
    far = varies & (reach > LARGEST * stats.std)
    width = np.maximum(stats.q99 - stats.q01, EPSILON)
    ends = [np.abs((value - stats.q01) / width * 2 - 1) for value in (stats.min, stats.max)]
    wide = varies & (np.maximum(*ends) > LARGEST)
    found = stats._replace(
        std=np.where(far, reach / LARGEST, stats.std),
        q01=np.where(wide, stats.min, stats.q01),
        q99=np.where(wide, stats.max, stats.q99),
    )
    return found, np.flatnonzero(far | wide).tolist()


def select_dims(stats: NormStats, dims: Sequence[int]) -> NormStats:
    """Statistics of some of the dimensions."""
    fields = {name: values[list(dims)] for name, values in stats._asdict().items() if values is not None}
    return NormStats(**fields)


def check_stats(stats: Stats, names: dict[str, tuple[str, ...]]) -> None:
    """Refuses statistics that are not of a robot's dimensions.

    Raises:
        UserError: statistics are missing, or have another number of dimensions.
    """
    for key, dims in names.items():
        if key not in stats:
            raise UserError(f"normalisation statistics lack {key!r}; they have {sorted(stats)}.")
        if len(stats[key].mean) != len(dims):
            raise UserError(
                f"normalisation statistics of {key!r} have {len(stats[key].mean)} dimensions; the robot has "
                f"{len(dims)}: {', '.join(dims)}. Compute them from this robot's demonstrations: pi0 data stats CONFIG."
            )


def stats_to_json(
    stats: Stats,
    groups: Mapping[str, Normalization] | None = None,
    semantics: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """The JSON object of openpi's `norm_stats.json`; `min` and `max` are added where known.

    `stats` are of the policy's own robot, `groups` those of a mixture by name, kept beside them, and `semantics` the
    meaning of each robot's action dimensions, without which the numbers mean nothing.
    """
    content: dict[str, Any] = {"norm_stats": _to_json(stats)}
    if semantics is not None:
        content["action_semantics"] = {name: list(kinds) for name, kinds in semantics.items()}
    if groups is not None and len(groups) > 1:
        content["groups"] = {name: _to_json(group.stats) for name, group in groups.items()}
    return content


def _to_json(stats: Stats) -> dict[str, Any]:
    keep = ("mean", "std", "q01", "q99")
    return {
        key: {
            field: None if value is None else value.tolist()
            for field, value in entry._asdict().items()
            if value is not None or field in keep
        }
        for key, entry in stats.items()
    }


def stats_from_json(content: dict[str, Any], group: str | None = None) -> Stats:
    """Statistics from the JSON object of a `norm_stats.json`, ours or openpi's.

    `group` names those that are wanted of a mixture's; where the file has no groups, its only ones are.

    Raises:
        UserError: something is missing, not finite, or of unequal length; or there is no such group.
    """
    if "norm_stats" not in content:
        raise UserError(f"normalisation statistics have keys {sorted(content)}; expected one called 'norm_stats'.")
    entries = content["norm_stats"]
    if group is not None and "groups" in content:
        if group not in content["groups"]:
            raise UserError(f"there are no statistics of {group!r}; there are those of {sorted(content['groups'])}.")
        entries = content["groups"][group]
    stats = {}
    for key, entry in entries.items():
        if missing := [field for field in ("mean", "std") if entry.get(field) is None]:
            raise UserError(f"normalisation statistics of {key!r} lack {missing}; they have {sorted(entry)}.")
        try:
            fields = {name: np.array(entry[name], float) for name in NormStats._fields if entry.get(name) is not None}
        except (TypeError, ValueError) as error:
            raise UserError(f"normalisation statistics of {key!r} are not lists of numbers ({error}).") from error
        stats[key] = NormStats(**fields)
        _check_finite(stats[key], key)
    return stats


def semantics_from_json(content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The meaning of each robot's actions in a `norm_stats.json`; empty for openpi's, which does not say."""
    return {name: tuple(kinds) for name, kinds in content.get("action_semantics", {}).items()}


def normalization_from_json(
    content: dict[str, Any], robot: Robot, override: Mapping[str, tuple[str, ...]] = {}, group: str | None = None
) -> Normalization:
    """Statistics and semantics for one robot from the JSON object of a `norm_stats.json`.

    `override` says what the actions mean where the file does not; `group` names the statistics of a mixture, None: the
    robot's.

    Raises:
        UserError: as of `stats_from_json` and `data.robots.semantics_of`.
    """
    semantics = semantics_of(robot, {**override, **semantics_from_json(content)})
    return Normalization(stats_from_json(content, group or robot.name), semantics)


def read_stats_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a `norm_stats.json`; errors as of `data.files.read_json`."""
    expected = "normalisation statistics, as `pi0 data stats CONFIG` writes, or openpi's norm_stats.json"
    return read_json(Path(path), expected, of_dataset=False)


def save_json(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a result of `stats_to_json`."""
    Path(path).write_text(json.dumps(content, indent=2))


def _low_and_divisor(stats: NormStats, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted and what is divided by; the divisor is 0 for constant dimensions."""
    if mode == "zscore":
        low, divisor = stats.mean, stats.std + EPSILON
    elif stats.q01 is None or stats.q99 is None:
        raise UserError("quantile normalisation needs q01 and q99, and these statistics have none. Use 'zscore'.")
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
            raise UserError(
                f"{field} of {key!r} has shape {value.shape}, its mean {stats.mean.shape}; expected one list of "
                "numbers of equal length."
            )
        if not np.isfinite(value).all():
            dims = np.flatnonzero(~np.isfinite(value)).tolist()
            raise UserError(f"{field} of {key!r} is not finite in dimensions {dims}. Compute the statistics again.")
