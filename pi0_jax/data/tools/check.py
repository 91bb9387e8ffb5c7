"""What spoils training on a dataset, found before it does."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from pi0_jax.config import PolicyConfig
from pi0_jax.data.lerobot.reader import LeRobotDataset
from pi0_jax.data.mixture import Part
from pi0_jax.data.normalization import RANGE_SHARE, Stats
from pi0_jax.data.source import ACTION, STATE, Renamed, Source

NEARLY_CONSTANT = 1e-6
"""Range, in the robot's units, below which a dimension is constant."""
BEYOND = 1.5
"""Quantile-normalised values beyond ± this count as outside."""
SHOWN = 5


def check_part(
    part: Part, policy: PolicyConfig, stats: Stats, *, outside: float = 0.05, decode: bool = False
) -> list[str]:
    """Problems of a dataset, each a sentence; empty if there is none.

    Args:
        part: the dataset, opened without the episodes that cannot be read, which are among the problems.
        policy: of the model.
        stats: what normalises it.
        outside: largest share of values beyond `BEYOND` times the range of the quantiles.
        decode: decode every frame.

    Raises:
        ValueError, FileNotFoundError: a column cannot be read at all, or holds what is not finite.
    """
    source, robot = part.source, part.robot
    found = [f"{name}: {reason}" for name, reason in source.skipped.items()]
    for key, feature, names in (("state", STATE, robot.state), ("actions", ACTION, robot.actions)):
        values = source.columns(feature)
        if values.shape[1:] != (len(names),):
            found.append(f"{feature} has shape {values.shape[1:]}; {robot.name} has {len(names)}: {', '.join(names)}")
            continue
        found += [f"{key} {problem}" for problem in _check_values(values, source, names)]
        found += [f"{key} {problem}" for problem in _check_ranges(stats[key], names)]
        found += _check_outside(values, stats[key], names, key, outside) if robot.adapt is None else []
    found += _check_tasks(source)
    found += _check_rate(part)
    inner = source
    while isinstance(inner, Renamed):
        inner = inner.source
    cameras = [key for key, name in robot.cameras.items() if name in policy.model.cameras]
    found += [f"camera {key!r} is missing; it has {list(source.cameras)}" for key in set(cameras) - set(source.cameras)]
    if isinstance(inner, LeRobotDataset):
        found += _check_timestamps(inner)
    if decode:
        found += _decode_all(source, [key for key in cameras if key in source.cameras])
    return found


def _check_values(values: np.ndarray, source: Source, names: tuple[str, ...]) -> list[str]:
    bad = ~np.isfinite(values)
    if not bad.any():
        return []
    episodes = [source.episodes[e] for e in np.unique(source.episode_of(np.flatnonzero(bad.any(1))))[:SHOWN]]
    return [f"{names[i]} is not finite in {n} frames of {', '.join(episodes)}" for i, n in enumerate(bad.sum(0)) if n]


def _check_ranges(entry, names: tuple[str, ...]) -> list[str]:
    spread = entry.max - entry.min
    found = []
    for i, name in enumerate(names):
        if spread[i] < NEARLY_CONSTANT:
            found.append(f"{name} is constant, {entry.mean[i]:.6g}: leave it out of the robot's dimensions")
        elif min(entry.q99[i] - entry.q01[i], entry.std[i]) < RANGE_SHARE * spread[i]:
            found.append(
                f"{name} is nearly constant: its 1 % to 99 % range is {entry.q99[i] - entry.q01[i]:.3g}, its standard "
                f"deviation {entry.std[i]:.3g}, of a range of {spread[i]:.3g}; look for outliers"
            )
    return found


def _check_outside(values: np.ndarray, entry, names: tuple[str, ...], key: str, limit: float) -> list[str]:
    """Only where the statistics are of these values: relative actions are left out by their dimensions' sizes."""
    width = np.maximum(entry.q99 - entry.q01, RANGE_SHARE * (entry.max - entry.min))
    if (values.min(0) < entry.min - 1e-6).any() or (values.max(0) > entry.max + 1e-6).any():
        return []
    normalised = (values - entry.q01) / np.where(width > 0, width, np.inf) * 2 - 1
    share = (np.abs(normalised) > BEYOND).mean(0)
    return [
        f"{key} {name}: {share[i]:.1%} of the frames are beyond {BEYOND} times the range of the quantiles"
        for i, name in enumerate(names)
        if share[i] > limit
    ]


def _check_tasks(source: Source) -> list[str]:
    used = np.unique(source.task_index)
    if len(used) and (used[0] < 0 or used[-1] >= len(source.tasks)):
        return [f"task indices reach {used[-1]}; there are {len(source.tasks)} tasks"]
    empty = [int(i) for i in used if not source.tasks[i].strip()]
    if not empty:
        return []
    rows = np.flatnonzero(np.isin(source.task_index, empty))
    episodes = [source.episodes[e] for e in np.unique(source.episode_of(rows))]
    more = "" if len(episodes) <= SHOWN else f" and {len(episodes) - SHOWN} more"
    return [f"tasks {empty} have no text; they are those of {', '.join(episodes[:SHOWN])}{more}"]


def _check_rate(part: Part) -> list[str]:
    if part.robot.fps is None or part.robot.fps == part.source.fps:
        return []
    return [f"{part.source.fps} frames a second; {part.robot.name} acts at {part.robot.fps}"]


def _check_timestamps(dataset: LeRobotDataset) -> list[str]:
    """Rows whose timestamp is not their number in the episode over the rate."""
    stamps, rows = dataset.columns("timestamp").reshape(-1), np.arange(dataset.num_frames)
    episode = dataset.episode_of(rows)
    starts = np.concatenate([[0], dataset.ends[:-1]])
    off = np.abs(stamps - (rows - starts[episode]) / dataset.fps) > 0.5 / dataset.fps
    if not off.any():
        return []
    names = [dataset.episodes[e] for e in np.unique(episode[off])]
    return [f"{off.sum()} timestamps are off {dataset.fps} frames a second, in {', '.join(names[:SHOWN])}"]


def _decode_all(source: Source, cameras: list[str]) -> list[str]:
    found = []
    with tqdm(total=source.num_episodes * len(cameras), desc="decoding", unit="episode") as bar:
        for camera in cameras:
            for episode in range(source.num_episodes):
                try:
                    source.images(camera, np.arange(*source.episode_range(episode)))
                except (ValueError, OSError) as error:
                    found.append(str(error))
                bar.update()
    return found
