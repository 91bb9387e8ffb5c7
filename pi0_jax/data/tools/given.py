"""Given statistics, such as those of released weights, held against the demonstrations that they are to normalise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.normalization import EPSILON, LARGEST, Mode, Stats, check_stats, normalize_values, select_dims
from pi0_jax.data.tools.stats import Summary, summarise_source

FAR = 5.0
"""A dimension is far off if more than half of its normalised values are beyond; inside [-1, 1] would be usual."""
ROUNDING = 1.01
"""What `LARGEST` may be exceeded by: statistics are read from text, and were computed in another order."""
NARROW = 0.1
"""A dimension is squeezed if 98 % of its normalised values are within so much, a twentieth of [-1, 1]. A joint that a
task leaves alone is; statistics are too wide where most of the dimensions that move are, as in radians by statistics of
degrees."""
EPISODES, FRAMES = 16, 20_000
"""Most that is read where time counts."""
SHOWN = 8
"""Dimensions that messages name."""


class Fit(NamedTuple):
    """How demonstrations lie within given statistics."""

    outside: float
    """Share of all normalised values that are outside [-1, 1]: 2 % for quantiles of the same data, about a third for
    means and deviations."""
    largest: float
    """Largest absolute normalised value."""
    far_off: list[str]
    """Dimensions that training would suffer from, with their numbers, the worst first and squeezed ones last."""


def fit_given(dataset: OpenDataset, given: Stats, mode: Mode, horizon: int, episodes: Int[np.ndarray, "e"]) -> Fit:
    """How some episodes lie within the statistics of a file, as training normalises them.

    Far off is a dimension with more than half of its values beyond `FAR`, or one beyond `LARGEST`; and those of the
    state, or of the actions, that are squeezed (`NARROW`), if most of those that move are.

    Raises:
        UserError: the statistics are not of the robot's dimensions; a value is not finite.
    """
    robot = dataset.robot
    check_stats(given, {"state": robot.model_state, "actions": robot.model_actions})
    summary = summarise_source(dataset.source, robot, dataset.semantics, horizon, episodes.tolist())
    found, squeezed = [], []
    for key, names in (("state", robot.model_state), ("actions", robot.model_actions)):
        moving, narrow = 0, []
        for name, raw, values in zip(names, *_values(summary, given, mode, key), strict=True):
            size, width = np.abs(values), float(np.diff(np.quantile(values, (0.01, 0.99)))[0])
            bad = np.median(size) > FAR or size.max() > ROUNDING * LARGEST
            found.append((float(size.max()), float((size > 1).mean()), f"{key} {name}", bad))
            moving += (moves := bool(np.ptp(raw) > EPSILON))
            narrow += [f"{key} {name} (98 % of the values in {width / 2:.2g} of [-1, 1])"] * (moves and width < NARROW)
        squeezed += narrow if 2 * len(narrow) > moving else []
    found.sort(reverse=True)
    far = [f"{name} ({share:.0%} outside [-1, 1], up to {size:.3g})" for size, share, name, bad in found if bad]
    return Fit(
        outside=float(np.mean([share for _, share, *_ in found])),
        largest=found[0][0],
        far_off=far + squeezed,
    )


def some_episodes(dataset: OpenDataset) -> Int[np.ndarray, "e"]:
    """Episodes, evenly spaced, that stand for those to train on where time counts."""
    places = np.linspace(0, len(dataset.training) - 1, min(EPISODES, len(dataset.training)))
    chosen = dataset.training[places.astype(int)]
    frames = np.cumsum(dataset.source.lengths[chosen])
    return chosen[: max(1, int((frames <= FRAMES).sum()))]


def _values(summary: Summary, given: Stats, mode: Mode, key: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Values of each dimension as they are, and normalised; of relative ones those of whole chunks."""
    if key == "state":
        raw = summary.state.sample
        return list(raw.T), list(normalize_values(raw, given[key], mode).T)
    assert summary.actions is not None
    single = summary.actions.sample
    raw, found = list(single.T), list(normalize_values(single, given[key], mode).T)
    if summary.relative is not None:
        chunks = summary.relative.sample
        normalised = normalize_values(chunks, select_dims(given[key], summary.dims), mode)
        for dim, before, after in zip(summary.dims, chunks.T, normalised.T, strict=True):
            raw[dim], found[dim] = before, after
    return raw, found
