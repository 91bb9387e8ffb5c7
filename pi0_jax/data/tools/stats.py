"""Statistics of datasets as training's own transforms give them, from columns alone: no picture is read."""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pi0_jax.atomic import written
from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.normalization import Normalization, NormStats, Stats, bounded
from pi0_jax.data.pool import run_tasks
from pi0_jax.data.poses import Poses
from pi0_jax.data.robots import Robot
from pi0_jax.data.sketch import Sketch, merge, summarise
from pi0_jax.data.source import ACTION, FEW_FRAMES, STATE, VALID, Source
from pi0_jax.data.transform import Sample, adapt, relative_actions, relative_dims
from pi0_jax.errors import UserError, listed

_log = logging.getLogger(__name__)

FRAMES_PER_TASK = 2**19
"""Frames that one task of a worker covers, at least one episode."""
ROWS_AT_ONCE = 2**20
"""Rows summarised at a time, which bounds memory."""
KEEP_EVERY = 60.0
"""Seconds after which what is done is kept on the disk."""
SAMPLED, SAMPLED_EPISODES = 2**17, 1024
"""Frames that statistics before a training are of, where the datasets have more than `FEW_FRAMES`, and at most so many
episodes, each of which may be a file."""


class Summary(NamedTuple):
    """What statistics are made of. Summaries can be merged, in any order and grouping, to the same quantiles."""

    state: Sketch
    actions: Sketch | None
    """Of the actions of single frames; None: none is valid."""
    relative: Sketch | None
    """Of those `dims` of actions that are relative to the state, over whole chunks."""
    dims: list[int]


def compute_normalizations(
    datasets: Sequence[OpenDataset],
    horizon: int,
    *,
    workers: int = 1,
    ray: bool = False,
    sampled: bool = False,
    kept: Path | None = None,
) -> dict[str, Normalization]:
    """Statistics of each group of datasets, over their training episodes, by the group's name.

    The result is the same for any number of `workers`, processes, up to rounding of means. `ray` hands the work to a
    Ray cluster instead. `sampled` takes episodes of some `SAMPLED` frames, or fewer, at random from each group of more
    than `FEW_FRAMES`, and the log says so: then it takes seconds, however large a dataset is. `kept` is a file for what
    is done when the computation is stopped, with which the next call goes on.

    Raises:
        UserError: as of `summarise_source`; datasets of one group have different dimensions, or actions of different
            meaning; all episodes of a group are held out; Ray is not installed.
    """
    datasets = [dataset for dataset in datasets if dataset.source.has_actions]
    first: dict[str, OpenDataset] = {}
    for dataset in datasets:
        one = first.setdefault(dataset.stats, dataset)
        shapes = [(len(each.robot.state), each.semantics, each.robot.poses) for each in (one, dataset)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"datasets with common statistics {dataset.stats!r} have {one.robot.name}'s and {dataset.robot.name}'s "
                "dimensions of state and actions, which differ in number or meaning. Give them different names in "
                "`stats`."
            )
    episodes = [_sample(dataset, datasets) if sampled else dataset.training for dataset in datasets]
    tasks = list(_split(datasets, horizon, episodes))
    done, totals = _read_kept(kept, key := _describe(datasets, horizon, episodes))
    counts, since = [len(chosen) for *_, chosen in tasks], time.monotonic()
    results = run_tasks(_summarise, tasks[done:], workers, ray=ray)
    bar = tqdm(total=sum(counts), desc="statistics", unit="episode", disable=len(tasks) < 2 or None)
    with bar, contextlib.ExitStack() as stopped:
        bar.update(sum(counts[:done]))
        stopped.callback(lambda: _write_kept(kept, key, done, totals))
        for (dataset, *_), summary in zip(tasks[done:], results, strict=True):
            found = totals.get(dataset.stats)
            totals[dataset.stats] = summary if found is None else merge_summaries([found, summary])
            bar.update(counts[done])
            done += 1
            if time.monotonic() - since > KEEP_EVERY:
                _write_kept(kept, key, done, totals)
                since = time.monotonic()
        stopped.pop_all()
    if kept is not None:
        kept.unlink(missing_ok=True)
    if empty := [str(dataset.source.root) for name, dataset in first.items() if name not in totals]:
        raise UserError(f"{listed(empty)} has no episode to train on: all are held out (data.validation_share).")
    return {
        name: Normalization(_bounded(finish(total), first[name]), first[name].semantics)
        for name, total in totals.items()
    }


def _split(
    datasets: Sequence[OpenDataset], horizon: int, episodes: Sequence[np.ndarray]
) -> Iterator[tuple[OpenDataset, int, int, np.ndarray]]:
    """Arguments of `_summarise` for the chosen episodes of each dataset, some `FRAMES_PER_TASK` frames at a time."""
    for number, (dataset, chosen) in enumerate(zip(datasets, episodes, strict=True)):
        frames = np.cumsum(dataset.source.lengths[chosen])
        for part in np.split(chosen, np.flatnonzero(np.diff(frames // FRAMES_PER_TASK)) + 1):
            if len(part):
                yield dataset, number, horizon, part


def _describe(datasets: Sequence[OpenDataset], horizon: int, episodes: Sequence[np.ndarray]) -> str:
    """What statistics are of: another one is another computation."""
    found = hashlib.sha256(repr((horizon, FRAMES_PER_TASK)).encode())
    for dataset, chosen in zip(datasets, episodes, strict=True):
        what = (
            str(dataset.source.root),
            dataset.source.fps,
            dataset.stats,
            dataset.robot.name,
            dataset.robot.poses,
            dataset.semantics,
        )
        found.update(repr(what).encode() + chosen.tobytes() + dataset.source.ends.tobytes())
    return found.hexdigest()


def _read_kept(path: Path | None, key: str) -> tuple[int, dict[str, Summary]]:
    """Number of tasks that a stopped computation had done, and what it had found."""
    if path is None or not path.is_file():
        return 0, {}
    with path.open("rb") as file:
        known, done, totals = pickle.load(file)
    if known != key:
        return 0, {}
    _log.info("goes on where it was stopped, by %s", path)
    return done, totals


def _write_kept(path: Path | None, key: str, done: int, totals: dict[str, Summary]) -> None:
    if path is not None and done:
        with written(path) as partial, partial.open("wb") as file:
            pickle.dump((key, done, totals), file)


def _sample(dataset: OpenDataset, datasets: Sequence[OpenDataset]) -> np.ndarray:
    """A dataset's part of the episodes that stand for those of its group."""
    total = sum(int(each.source.lengths[each.training].sum()) for each in datasets if each.stats == dataset.stats)
    if total <= FEW_FRAMES:
        return dataset.training
    episodes = sum(len(each.training) for each in datasets if each.stats == dataset.stats)
    count = math.ceil(len(dataset.training) * min(SAMPLED / total, SAMPLED_EPISODES / episodes, 1.0))
    chosen = np.sort(np.random.default_rng(0).choice(dataset.training, count, replace=False))
    _log.info(
        "%s: statistics are of %d of %d episodes, taken at random; `pi0 data stats` and data.norm_stats take all",
        dataset.source.root,
        count,
        len(dataset.training),
    )
    return chosen


def _bounded(stats: Stats, dataset: OpenDataset) -> Stats:
    found: Stats = {}
    for key, names in (("state", dataset.robot.model_state), ("actions", dataset.robot.model_actions)):
        found[key], dims = bounded(stats[key])
        if dims:
            _log.info(
                "%s %s %s: hardly ever moves, or spikes; normalised by its whole range",
                dataset.stats,
                key,
                ", ".join(names[i] if i < len(names) else str(i) for i in dims),
            )
    return found


def summarise_source(
    source: Source,
    robot: Robot | None = None,
    semantics: tuple[str, ...] = (),
    horizon: int = 1,
    episodes: Iterable[int] | None = None,
    *,
    identity: int = 0,
) -> Summary:
    """Summary of the states and actions that the model will see, before normalisation.

    Actions are those of every frame; dimensions that are relative to the state are taken over whole chunks from every
    frame, as training sees them, up to the episode's end. Frames marked invalid (column `valid` 0) give no action, and
    end a chunk. The robot's `adapt` converts the units (None: as they are); empty `semantics` are all absolute;
    `episodes` None are all. `identity` is a number of the dataset among those whose summaries are merged.

    Raises:
        UserError: a value is not finite, or no action is valid.
    """
    chosen = np.arange(source.num_episodes) if episodes is None else np.asarray(list(episodes), int)
    limit = ROWS_AT_ONCE // (horizon if relative_dims(semantics, _poses(robot)) else 1)
    groups = np.split(chosen, np.flatnonzero(np.diff(np.cumsum(source.lengths[chosen]) // limit)) + 1)
    total = merge_summaries(
        _summarise_episodes(source, robot, semantics, horizon, group, identity) for group in groups if len(group)
    )
    if total.actions is None:
        raise UserError(f"{source.root}: column {VALID!r} is 0 in all frames, so no action is left to learn.")
    return total


def merge_summaries(summaries: Iterable[Summary]) -> Summary:
    """One summary of several, at least one."""
    return functools.reduce(
        lambda a, b: Summary(
            merge(a.state, b.state), _merge(a.actions, b.actions), _merge(a.relative, b.relative), a.dims
        ),
        summaries,
    )


def finish(summary: Summary) -> Stats:
    """The statistics that a summary stands for."""
    assert summary.actions is not None
    stats = {"state": stats_of(summary.state), "actions": stats_of(summary.actions)}
    if summary.relative is not None:
        for values, relative in zip(stats["actions"], stats_of(summary.relative), strict=True):
            assert values is not None
            values[summary.dims] = relative
    return stats


def stats_of(sketch: Sketch) -> NormStats:
    """Statistics of the rows of a sketch."""
    q01, q99 = sketch.quantile(0.01), sketch.quantile(0.99)
    return NormStats(sketch.mean.copy(), np.sqrt(sketch.variance), q01, q99, sketch.min.copy(), sketch.max.copy())


def _merge(a: Sketch | None, b: Sketch | None) -> Sketch | None:
    return merge(a, b) if a is not None and b is not None else a or b


def _summarise(dataset: OpenDataset, number: int, horizon: int, episodes: np.ndarray) -> Summary:
    return summarise_source(
        dataset.source, dataset.robot, dataset.semantics, horizon, episodes.tolist(), identity=number
    )


def _summarise_episodes(
    source: Source, robot: Robot | None, semantics: tuple[str, ...], horizon: int, episodes: np.ndarray, number: int
) -> Summary:
    ends = np.cumsum(source.lengths[episodes])
    names = [STATE, ACTION] + [VALID] * (VALID in source.features)
    columns = {name: source.read(name, episodes) for name in names}
    for name, values in columns.items():
        if (bad := ~np.isfinite(values).all(1)).any():
            rows = np.unique(np.searchsorted(ends, np.flatnonzero(bad), side="right"))
            where = [source.episodes[episode] for episode in episodes[rows].tolist()]
            raise UserError(
                f"{source.root}: column {name!r} holds NaN or infinity in {bad.sum()} frames, in {listed(where)}. "
                "Leave these episodes out (`without_episodes` of a DatasetConfig), or record them again."
            )
    sample: Sample = {"state": columns[STATE], "actions": columns[ACTION]}
    sample = sample if robot is None else adapt(robot).forward(sample)
    state, actions = sample["state"], sample["actions"]
    valid = columns[VALID][:, 0] > 0 if VALID in columns else np.ones(len(state), bool)
    rows = (np.uint64(number) << np.uint64(48)) + source.frames_of(episodes).astype(np.uint64)
    starts, dims = np.flatnonzero(valid), relative_dims(semantics, _poses(robot))
    whole = summarise(state, rows)
    if not len(starts):
        return Summary(whole, None, None, dims)
    single = summarise(actions[starts], rows[starts])
    if not dims:
        return Summary(whole, single, None, dims)
    steps = starts[:, None] + np.arange(horizon)
    inside = steps < ends[np.searchsorted(ends, starts, side="right")][:, None]
    steps = np.minimum(steps, len(state) - 1)
    inside &= np.logical_and.accumulate(valid[steps], axis=1)
    to_relative = relative_actions(semantics, _poses(robot)).forward
    chunks = to_relative({"state": state[starts], "actions": actions[steps]})["actions"]
    numbers = (rows[starts][:, None] * np.uint64(horizon) + np.arange(horizon, dtype=np.uint64))[inside]
    return Summary(whole, single, summarise(chunks[inside][:, dims], numbers), dims)


def _poses(robot: Robot | None) -> Poses:
    return Poses() if robot is None else robot.poses
