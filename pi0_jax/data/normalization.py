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
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from pi0_jax.data.robots import Robot
from pi0_jax.data.sketch import Sketch, merge, summarise
from pi0_jax.data.source import ACTION, STATE, VALID, Source

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

Summary = dict[str, Any]
"""What statistics are made of, and what can be merged: `state` and `actions`, lists of sketches. Where some actions are
relative, the second sketch of `actions` is theirs, and `dims` says which they are."""

ROWS_AT_ONCE = 2**20
"""Rows summarised at a time, which bounds memory."""


class Affine(NamedTuple):
    """A normalisation as raw = scale * normalised + offset. `scale` is 0 for constant dimensions."""

    scale: Float[np.ndarray, "d"]
    offset: Float[np.ndarray, "d"]


def compute_stats(
    source: Source,
    robot: Robot | None = None,
    semantics: tuple[str, ...] = (),
    horizon: int = 1,
    episodes: Iterable[int] | None = None,
) -> Stats:
    """Statistics of one dataset, from its columns alone, in this process; see `summarise_source`."""
    return finish(summarise_source(source, robot, semantics, horizon, episodes))


def summarise_source(
    source: Source,
    robot: Robot | None = None,
    semantics: tuple[str, ...] = (),
    horizon: int = 1,
    episodes: Iterable[int] | None = None,
    *,
    identity: int = 0,
) -> Summary:
    """Summaries of the states and actions that the model will see, before normalisation.

    Actions are those of every frame; dimensions that are relative to the state are taken over whole chunks from every
    frame, as training sees them, up to the episode's end. Frames marked invalid (column `valid` 0) give no action, and
    end a chunk.

    Args:
        source: the demonstrations.
        robot: whose units are converted by its `adapt`; None: as they are.
        semantics: of the actions; empty: all absolute.
        horizon: actions in a chunk.
        episodes: those to look at; None: all.
        identity: of the dataset among those whose summaries are merged.

    Raises:
        ValueError: a value is not finite, or no action is valid.
    """
    chosen = np.arange(source.num_episodes) if episodes is None else np.asarray(list(episodes), int)
    relative = [i for i, kind in enumerate(semantics) if kind in ("relative", "angle")]
    lengths = np.diff(source.ends, prepend=0)
    limit = ROWS_AT_ONCE // (horizon if relative else 1)
    total: Summary | None = None
    for part in np.split(chosen, np.flatnonzero(np.diff(np.cumsum(lengths[chosen]) // limit)) + 1):
        if len(part):
            found = _summarise_episodes(source, robot, semantics, horizon, part, identity)
            total = found if total is None else merge_summaries([total, found])
    if total is None or "actions" not in total:
        raise ValueError(f"{source.root}: column {VALID!r} is 0 in all frames, so no action is left to learn.")
    return total


def _summarise_episodes(source, robot, semantics, horizon, episodes: np.ndarray, identity: int) -> Summary:
    first, end = int(episodes[0]), int(episodes[-1]) + 1
    offset = source.episode_range(first)[0]
    ends = source.ends[first:end] - offset
    names = [STATE, ACTION] + [VALID] * (VALID in source.features)
    columns = {name: source.read(name, first, end) for name in names}
    for name, values in columns.items():
        if (bad := ~np.isfinite(values).all(1)).any():
            where = source.episodes[first + int(np.searchsorted(ends, np.flatnonzero(bad)[0], side="right"))]
            raise ValueError(
                f"{source.root}: column {name!r} holds NaN or infinity in {bad.sum()} frames, the first of them in "
                f"{where}. Record it again without them."
            )
    state, actions = columns[STATE], columns[ACTION]
    if robot is not None and robot.adapt is not None:
        state, actions = robot.adapt.state(state), robot.adapt.actions(actions)
    kept = np.isin(first + np.searchsorted(ends, np.arange(len(state)), side="right"), episodes)
    valid = columns[VALID][:, 0] > 0 if VALID in columns else np.ones(len(state), bool)
    rows = (np.uint64(identity) << np.uint64(48)) + np.arange(offset, offset + len(state), dtype=np.uint64)
    found: Summary = {"state": [summarise(state[kept], rows[kept])]}
    if (kept & valid).any():
        found["actions"] = [summarise(actions[kept & valid], rows[kept & valid])]
        dims = [i for i, kind in enumerate(semantics) if kind in ("relative", "angle")]
        if dims:
            angles = [i for i, dim in enumerate(dims) if semantics[dim] == "angle"]
            starts = np.flatnonzero(kept & valid)
            steps = starts[:, None] + np.arange(horizon)
            until = ends[np.searchsorted(ends, starts, side="right")][:, None]
            inside = steps < until
            steps = np.minimum(steps, len(state) - 1)
            inside &= np.logical_and.accumulate(valid[steps], axis=1)
            difference = actions[steps][..., dims] - state[starts][:, None, dims]
            difference[..., angles] = np.pi - np.mod(np.pi - difference[..., angles], 2 * np.pi)
            numbers = (rows[starts][:, None] * np.uint64(horizon) + np.arange(horizon, dtype=np.uint64))[inside]
            found["actions"].append(summarise(difference[inside], numbers))
            found["dims"] = dims
    return found


def merge_summaries(summaries: Iterable[Summary]) -> Summary:
    """One summary of several, with any order and grouping giving the same quantiles."""
    total: Summary = {}
    for summary in summaries:
        for key, value in summary.items():
            if key == "dims" or key not in total:
                total[key] = value
            else:
                total[key] = [merge(a, b) for a, b in zip(total[key], value, strict=True)]
    return total


def finish(summary: Summary) -> Stats:
    """The statistics that a summary stands for."""
    stats = {"state": _finish(summary["state"][0]), "actions": _finish(summary["actions"][0])}
    if "dims" in summary:
        relative = _finish(summary["actions"][1])
        for whole, part in zip(stats["actions"], relative, strict=True):
            assert whole is not None
            whole[summary["dims"]] = part
    return stats


def _finish(sketch: Sketch) -> NormStats:
    q01, q99 = sketch.quantile(0.01), sketch.quantile(0.99)
    return NormStats(sketch.mean.copy(), np.sqrt(sketch.variance), q01, q99, sketch.min.copy(), sketch.max.copy())


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


def stats_to_json(
    stats: Stats, groups: dict[str, Stats] | None = None, semantics: dict[str, tuple[str, ...]] | None = None
) -> dict[str, Any]:
    """The JSON object of openpi's `norm_stats.json`; `min` and `max` are added where known.

    Args:
        stats: of the policy's own robot.
        groups: statistics by name, of a mixture; kept beside them.
        semantics: for each robot what its action dimensions mean, without which the numbers mean nothing.
    """
    content: dict[str, Any] = {"norm_stats": _to_json(stats)}
    if semantics is not None:
        content["action_semantics"] = {name: list(kinds) for name, kinds in semantics.items()}
    if groups is not None and len(groups) > 1:
        content["groups"] = {name: _to_json(group) for name, group in groups.items()}
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

    Args:
        content: the object.
        group: name of the statistics that are wanted of a mixture's; where the file has no groups, its only ones are.

    Raises:
        ValueError: something is missing, not finite, or of unequal length; or there is no such group.
    """
    if "norm_stats" not in content:
        raise ValueError(f"normalisation statistics have keys {sorted(content)}; expected one called 'norm_stats'.")
    entries = content["norm_stats"]
    if group is not None and "groups" in content:
        if group not in content["groups"]:
            raise ValueError(f"there are no statistics of {group!r}; there are those of {sorted(content['groups'])}.")
        entries = content["groups"][group]
    stats = {}
    for key, entry in entries.items():
        if missing := [field for field in ("mean", "std") if entry.get(field) is None]:
            raise ValueError(f"normalisation statistics of {key!r} lack {missing}; they have {sorted(entry)}.")
        fields = {name: np.array(entry[name], np.float64) for name in NormStats._fields if entry.get(name) is not None}
        stats[key] = NormStats(**fields)
        _check_finite(stats[key], key)
    return stats


def semantics_from_json(content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """What each robot's actions mean according to a `norm_stats.json`; empty for openpi's, which does not say."""
    return {name: tuple(kinds) for name, kinds in content.get("action_semantics", {}).items()}


def read_stats_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a `norm_stats.json`; errors as of `load_stats`."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path}; expected normalisation statistics.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected openpi's norm_stats.json.") from error


def load_stats(path: str | os.PathLike[str]) -> Stats:
    """Reads a `norm_stats.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    return stats_from_json(read_stats_file(path))


def save_stats(stats: Stats, path: str | os.PathLike[str]) -> None:
    """Writes a `norm_stats.json`, which openpi reads too."""
    save_json(stats_to_json(stats), path)


def save_json(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes what `stats_to_json` gave."""
    Path(path).write_text(json.dumps(content, indent=2))


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
