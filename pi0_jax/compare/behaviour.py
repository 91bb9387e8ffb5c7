"""What is measured in closed loop besides success: which of several right ways is taken, and what delay does."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pi0_jax.compare.config import CompareConfig, Contender
from pi0_jax.evaluate.latency import STRATEGIES, Latency, simulate, summary
from pi0_jax.evaluate.rollout import Rollout
from pi0_jax.evaluate.simulators.gym import Episodes
from pi0_jax.inference.policy import Policy

BATCH = 64
"""Episodes side by side."""


def modes(rollout: Rollout, names: tuple[str, ...]) -> dict[str, Any]:
    """How successful episodes went.

    Returns:
        `modes`, the number of episodes that took each of the modes `names`; and `pairs`: of all pairs of episodes with
        the same layout how many took different ones, and how many pairs there are.
    """
    won = [outcome for outcome in rollout.outcomes if outcome.success]
    counts, layouts = Counter(outcome.mode for outcome in won), {}
    for outcome in won:
        layouts.setdefault(outcome.seed, []).append(outcome.mode)
    pairs = [a != b for found in layouts.values() for a, b in itertools.combinations(found, 2)]
    return {"modes": {name: counts[name] for name in names}, "pairs": [sum(pairs), len(pairs)]}


def recorded_modes(path: str | Path | None, names: tuple[str, ...]) -> dict[str, int] | None:
    """How many demonstrations of a dataset took each mode; None where its recording does not say."""
    if path is None or not names or not (file := Path(path) / "meta" / "recording.json").is_file():
        return None
    counts = Counter(episode.get("mode") for episode in json.loads(file.read_text())["episodes"])
    return {name: counts[name] for name in names}


def mode_coverage(taken: Mapping[str, int], demonstrated: Mapping[str, int]) -> float:
    """The overlap of two distributions over modes: 1 where each is taken as often as in the demonstrations, 0 where
    none of theirs is taken (one minus the total variation distance)."""
    total, all_demonstrated = sum(taken.values()), sum(demonstrated.values())
    if not total or not all_demonstrated:
        return 0.0
    return sum(min(taken.get(name, 0) / total, count / all_demonstrated) for name, count in demonstrated.items())


def reactions(
    config: CompareConfig, contender: Contender, path: Path, simulator: Episodes, seed: int
) -> list[dict[str, Any]]:
    """Closed loop in simulated time for each way of acting and each latency, with the contender's first sampler.

    Returns:
        For each `way` and `latency_ms` the figures of `evaluate.latency.summary`.
    """
    sampler, rows = next(iter(contender.samplers.values())), []
    for way in contender.ways:
        strategy, real_time = STRATEGIES[way]
        policy = Policy.load(path, sampler=sampler, real_time=real_time)
        for milliseconds in config.latencies:
            how = (strategy(policy.config.execute_steps), Latency(milliseconds), config.episodes, 1000 + seed)
            traces = simulate(policy, simulator, *how, batch_size=BATCH)
            rows.append({"way": way, "latency_ms": milliseconds, **summary(traces, simulator.fps)})
    return rows
