"""Problems of a dataset that spoil training, found before it starts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.normalization import RANGE_SHARE, NormStats, Stats
from pi0_jax.data.pool import run_tasks
from pi0_jax.data.rates import Resampled, same_rate
from pi0_jax.data.sketch import summarise
from pi0_jax.data.source import ACTION, STATE, Source, Wrapped
from pi0_jax.data.tools.grippers import check_grippers
from pi0_jax.data.tools.robot import propose_semantics
from pi0_jax.data.tools.stats import stats_of
from pi0_jax.errors import listed

NEARLY_CONSTANT = 1e-6
"""Range, in the robot's units, below which a dimension is constant."""
BEYOND = 1.5
"""Quantile-normalised values beyond ± this count as outside."""
SHOWN = 5
DECODED = 16
"""Episodes that a process decodes at a time."""


class Findings(NamedTuple):
    """What is to be known of a dataset, each a sentence."""

    problems: list[str]
    """Spoil a training."""
    notes: list[str]
    """Worth a look."""


def check_dataset(
    dataset: OpenDataset, stats: Stats, *, outside: float = 0.05, decode: bool = False, ray: bool = False
) -> Findings:
    """Problems of a dataset, and what is worth a look.

    The dataset is opened without the episodes that cannot be read, which are among the problems. `stats` are those of
    the episodes to train on. `outside` is the largest share of values beyond `BEYOND` times the range of the quantiles;
    `decode` decodes every frame, in one process per core, or on a Ray cluster with `ray`.

    Raises:
        UserError, FileNotFoundError: a column cannot be read at all, or holds what is not finite.
    """
    source, robot = dataset.source, dataset.robot
    found, notes = source.skipped_lines(), []
    for key, feature, names in (("state", STATE, robot.state), ("actions", ACTION, robot.actions)):
        values = source.columns(feature)
        if values.shape[1:] != (len(names),):
            found.append(f"{feature} has shape {values.shape[1:]}; {robot.name} has {len(names)}: {', '.join(names)}")
            continue
        notes += [
            f"{key} {note}"
            for note in _check_ranges(stats_of(summarise(values, np.arange(len(values), dtype=np.uint64))), names)
        ]
        as_they_are = robot.adapt is None and not getattr(robot.poses, key)
        if as_they_are:
            found += _check_outside(values[source.frames_of(dataset.training)], stats[key], names, key, outside)
    found += _check_semantics(dataset)
    against, grippers = check_grippers(dataset)
    found, notes = found + against, notes + grippers
    found += _check_tasks(source)
    if robot.fps is not None and not same_rate(source.fps, robot.fps):
        found.append(
            f"{source.fps} frames per second; {robot.name} acts at {robot.fps}. --data.resample-fps {robot.fps:g} "
            "brings the dataset to that rate"
        )
    inner = source
    while isinstance(inner, Wrapped):
        inner = inner.source
    missing = [key for key in dataset.cameras if key not in source.cameras]
    found += [f"camera {key!r} is missing; it has {list(source.cameras)}" for key in missing]
    if isinstance(inner, LeRobotDataset):
        found += ([inner.miscounted] if inner.miscounted else []) + _check_timestamps(inner)
    cameras = [key for key in dataset.cameras if key not in missing]
    if decode:
        found += _decode_all(source, cameras, ray)
    else:
        found += [error for camera in cameras for error in _decode(source, camera, range(1), whole=False)]
    return Findings(found, notes)


def _check_semantics(dataset: OpenDataset) -> list[str]:
    """Whether actions that are to become relative are positions."""
    source, robot = dataset.source, dataset.robot
    state, actions = source.columns(STATE), source.columns(ACTION)
    if (state.shape[1:], actions.shape[1:]) != ((len(robot.state),), (len(robot.actions),)):
        return []
    proposed = propose_semantics(state.astype(float), actions.astype(float), robot.state, robot.actions, robot.poses)
    changes = [name for name, p in zip(robot.actions, proposed, strict=True) if p.value == "absolute"]
    undeclared = [name for name in changes if name not in robot.changes]
    if isinstance(source, Resampled) and undeclared:
        return [
            f"actions {undeclared} do not follow the state, and would be interpolated at {source.fps:g} frames per "
            f"second as positions are. If they are changes, name them in `changes` of {robot.name}, and if they are "
            "velocities in `velocities` too"
        ]
    relative = [i for i, kind in enumerate(dataset.semantics) if kind in ("relative", "angle")]
    wrong = [robot.actions[i] for i in relative if proposed[i].value == "absolute"]
    if not wrong:
        return []
    reason = proposed[relative[0]].reason
    return [
        f"actions {wrong} are {dataset.semantics[relative[0]]} by {robot.name}, but do not follow the state: they seem "
        f"to be changes already ({robot.actions[relative[0]]}: {reason}). Their meaning is then absolute: "
        "policy.action_semantics, or the robot's `semantics`"
    ]


def _bounds(entry: NormStats) -> tuple[np.ndarray, ...]:
    """Minimum, maximum, and the 1 % and 99 % quantiles, which statistics of demonstrations always have."""
    return tuple(np.asarray(values, float) for values in (entry.min, entry.max, entry.q01, entry.q99))


def _check_ranges(entry: NormStats, names: tuple[str, ...]) -> list[str]:
    low, high, q01, q99 = _bounds(entry)
    spread, middle = high - low, q99 - q01
    found, constant = [], []
    for i, name in enumerate(names):
        if spread[i] < NEARLY_CONSTANT:
            constant.append(f"{name} {entry.mean[i]:.6g}")
        elif min(middle[i], entry.std[i]) < RANGE_SHARE * spread[i]:
            found.append(
                f"{name} is nearly constant: its 1 % to 99 % range is {middle[i]:.3g}, its standard deviation "
                f"{entry.std[i]:.3g}, of a range of {spread[i]:.3g}; look for outliers"
            )
    return found + ([f"that are constant, of which nothing is learnt: {', '.join(constant)}"] if constant else [])


def _check_outside(values: np.ndarray, entry: NormStats, names: tuple[str, ...], key: str, limit: float) -> list[str]:
    """Only where the statistics are of these values: relative actions are left out by their dimensions' sizes."""
    low, high, q01, q99 = _bounds(entry)
    width = np.maximum(q99 - q01, RANGE_SHARE * (high - low))
    if (values.min(0) < low - 1e-6).any() or (values.max(0) > high + 1e-6).any():
        return []
    normalised = (values - q01) / np.where(width > 0, width, np.inf) * 2 - 1
    share = (np.abs(normalised) > BEYOND).mean(0)
    return [
        f"{key} {name}: {share[i]:.1%} of the frames are beyond {BEYOND} times the range of the quantiles"
        for i, name in enumerate(names)
        if share[i] > limit
    ]


def _check_tasks(source: Source) -> list[str]:
    used = np.unique(source.task_index)
    empty = [int(i) for i in used if not source.tasks[i].strip()]
    if not empty:
        return []
    rows = np.flatnonzero(np.isin(source.task_index, empty))
    episodes = [source.episodes[e] for e in np.unique(source.episode_of(rows))]
    return [f"tasks {empty} have no text; they are those of {listed(episodes, SHOWN)}"]


def _check_timestamps(dataset: LeRobotDataset) -> list[str]:
    """Rows whose timestamp is not their number in the episode over the rate."""
    stamps, rows = dataset.columns("timestamp").reshape(-1), np.arange(dataset.num_frames)
    episode = dataset.episode_of(rows)
    starts = dataset.ends - dataset.lengths
    off = np.abs(stamps - (rows - starts[episode]) / dataset.fps) > 0.5 / dataset.fps
    if not off.any():
        return []
    names = [dataset.episodes[e] for e in np.unique(episode[off])]
    return [f"{off.sum()} timestamps are off {dataset.fps} frames per second, in {', '.join(names[:SHOWN])}"]


def _decode_all(source: Source, cameras: list[str], ray: bool) -> list[str]:
    tasks = [
        (source, camera, range(first, min(first + DECODED, source.num_episodes)))
        for camera in cameras
        for first in range(0, source.num_episodes, DECODED)
    ]
    found = []
    with tqdm(total=source.num_episodes * len(cameras), desc="decoding", unit="episode") as bar:
        for (_, _, episodes), errors in zip(tasks, run_tasks(_decode, tasks, ray=ray), strict=True):
            found += errors
            bar.update(len(episodes))
    return found


def _decode(source: Source, camera: str, episodes: range, *, whole: bool = True) -> list[str]:
    """What is wrong with the pictures of some episodes, or with the first of each."""
    found = []
    for episode in episodes:
        first, end = source.episode_range(episode)
        try:
            source.images(camera, np.arange(first, end if whole else first + 1))
        except (ValueError, OSError) as error:
            found.append(str(error))
    return found
