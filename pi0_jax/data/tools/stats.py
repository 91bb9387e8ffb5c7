"""Statistics of datasets, from their columns alone, by several processes: no picture is read."""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from pi0_jax.config import PolicyConfig
from pi0_jax.data.mixture import Part
from pi0_jax.data.normalization import Stats, Summary, finish, merge_summaries, summarise_source
from pi0_jax.data.robots import semantics_of

FRAMES_PER_TASK = 2**19
"""Frames that one task of a worker covers, at least one episode."""


def compute_group_stats(
    parts: Sequence[Part], policy: PolicyConfig, *, workers: int = 1, ray: bool = False
) -> dict[str, Stats]:
    """Statistics of each group of datasets, over their training episodes.

    Args:
        parts: the datasets.
        policy: horizon, and the meaning of actions.
        workers: processes; 1: this one. The result is the same for any number, up to rounding of means.
        ray: hand the work to a Ray cluster instead, which the `ray` extra brings.

    Raises:
        ValueError: as of `summarise_source`; datasets of one group have different dimensions; Ray is not installed.
    """
    work: list[Task] = []
    widths: dict[str, tuple[int, int]] = {}
    for number, part in enumerate(parts):
        width = (len(part.robot.state), len(part.robot.actions))
        if widths.setdefault(part.stats, width) != width:
            raise ValueError(
                f"datasets with common statistics {part.stats!r} have {widths[part.stats]} and {width} dimensions of "
                "state and actions. Give them different names in `stats`."
            )
        semantics = semantics_of(part.robot, policy.action_semantics)
        frames = np.cumsum(np.diff(part.source.ends, prepend=0)[part.training])
        cuts = np.flatnonzero(np.diff(frames // FRAMES_PER_TASK)) + 1
        for episodes in np.split(part.training, cuts):
            if len(episodes):
                work.append((part, number, semantics, policy.model.action_horizon, episodes))
    totals: dict[str, list[Summary]] = {}
    count = sum(len(episodes) for *_, episodes in work)
    results = _with_ray(work) if ray else _each(work, workers)
    with tqdm(total=count, desc="statistics", unit="episode", disable=len(work) < 2 or None) as bar:
        for (part, *_, episodes), summary in zip(work, results, strict=True):
            totals.setdefault(part.stats, []).append(summary)
            bar.update(len(episodes))
    return {name: finish(merge_summaries(found)) for name, found in totals.items()}


Task = tuple[Part, int, tuple[str, ...], int, np.ndarray]
"""A dataset, its number, the meaning of its actions, the horizon, and some of its episodes."""


def _summarise(part: Part, number: int, semantics: tuple[str, ...], horizon: int, episodes: np.ndarray) -> Summary:
    return summarise_source(part.source, part.robot, semantics, horizon, episodes, identity=number)


def _each(work: list[Task], workers: int) -> Iterator[Summary]:
    if workers <= 1 or len(work) < 2:
        yield from (_summarise(*task) for task in work)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(work)), mp_context=context) as pool:
        yield from pool.map(_summarise, *zip(*work, strict=True))


def _with_ray(work: list[Task]) -> Iterator[Summary]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ValueError("statistics on a cluster need Ray: pip install pi0_jax[ray]") from error
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=None if "RAY_ADDRESS" in os.environ else os.cpu_count(), include_dashboard=False)
    try:
        # The index of a dataset may be large: it goes to a node once, not with every task.
        shared = {number: ray.put(part) for number, part in {number: part for part, number, *_ in work}.items()}
        run = ray.remote(_summarise)
        yield from map(ray.get, [run.remote(shared[number], number, *rest) for _, number, *rest in work])
    finally:
        if started:
            ray.shutdown()
