"""From chunks beside demonstrations to figures, in numpy.

Arrays: n chunks, ah steps, d action dimensions; `episode` numbers the episode of each chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from pi0_jax.diagnose.figures import Dimension, Interval, Nearness, Roughness, Switches, Use

DRAWS = 1000
"""Bootstrap samples of the episodes."""
Values = Float[np.ndarray, "n ah d"]
Valid = Bool[np.ndarray, "n ah"]
Episodes = Int[np.ndarray, "n"]


def root_mean_square(errors: Values, valid: Valid) -> float:
    """Over valid steps and all dimensions; 0 where no step is valid."""
    return float(np.sqrt(np.mean(np.square(errors[valid])))) if valid.any() else 0.0


def per_chunk(errors: Values, valid: Valid) -> Float[np.ndarray, "n"]:
    """Root mean square of each chunk; 0 where none of its steps is valid."""
    sums = np.where(valid[..., None], np.square(errors), 0).mean(-1).sum(-1)
    return np.sqrt(sums / np.maximum(valid.sum(-1), 1))


def bootstrap(episode: Episodes, *terms: Shaped[np.ndarray, "n"], seed: int = 0) -> Float[np.ndarray, "k draws"]:
    """Sums of each of k terms over the chunks of episodes drawn with replacement."""
    count = int(episode.max()) + 1
    sums = np.stack([np.bincount(episode, term.astype(float), count) for term in terms])
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    return sums @ weights.T


def use(kind: str, name: str, how: str, plain: Values, without: Values, expert: Values, valid: Valid, episode) -> Use:
    """What becomes of the error without something.

    Args:
        kind, name, how: as in `Use`.
        plain, without: chunks from the same noise.
        expert: demonstrated chunks.
        valid: steps that count.
        episode: of each chunk.
    """
    squares = [np.where(valid[..., None], np.square(x - expert), 0).sum((1, 2)) for x in (plain, without)]
    before, after = bootstrap(episode, *squares)
    least = 1e-12 * valid.sum() * expert.shape[-1]  # of a policy that is exactly right
    ratio = np.sqrt(np.maximum(after, least) / np.maximum(before, least)) - 1
    total = [max(float(x.sum()), least) for x in squares]
    low, high = np.quantile(ratio, [0.025, 0.975])
    error = root_mean_square(plain - expert, valid)
    increase = Interval(float(np.sqrt(total[1] / total[0])) - 1, float(low), float(high))
    change = root_mean_square(without - plain, valid) / max(error, 1e-6)
    return Use(kind, name, how, root_mean_square(without - expert, valid), increase, change)


def average_error(expert: Values, valid: Valid) -> float:
    """Error of the average of the demonstrated actions, always."""
    return root_mean_square(expert - _mean(expert, valid), valid)


def dimensions(
    names: Sequence[str], predicted: Values, expert: Values, raw: Mapping[str, float], valid: Valid
) -> list[Dimension]:
    """Each of the model's dimensions with its skill, and its error in the robot's units where `raw` has one."""
    found = []
    variance = np.square(expert - _mean(expert, valid))[valid].mean(0)
    error = np.square(predicted - expert)[valid].mean(0)
    for i, name in enumerate(names):
        skill = float(1 - error[i] / variance[i]) if variance[i] > 1e-6 else None
        found.append(Dimension(name, raw.get(name), skill))
    return found


def per_dimension(errors: Values, valid: Valid) -> list[float]:
    """Root mean square of each dimension."""
    return np.sqrt(np.square(errors)[valid].mean(0)).tolist()


def horizon(errors: Values, valid: Valid) -> list[float]:
    """Error of each step of the chunk, up to the last that is valid in some chunk."""
    steps = range(int(np.flatnonzero(valid.any(0)).max(initial=-1)) + 1)
    return [root_mean_square(errors[:, [k]], valid[:, [k]]) for k in steps]


def phases(errors: Values, valid: Valid, step: Episodes, length: Episodes) -> list[float | None]:
    """Error in the first, second and last third of the episodes, by where a chunk begins; None: no chunk does."""
    third = np.minimum(3 * step // np.maximum(length, 1), 2)
    chosen = [third == i for i in range(3)]
    return [root_mean_square(errors[rows], valid[rows]) if valid[rows].any() else None for rows in chosen]


def roughness(
    predicted: Values, expert: Values, valid: Valid, episode: Episodes, every: int, smooth: Sequence[int]
) -> Roughness:
    """Jitter within chunks and steps at seams, over those of the demonstrations.

    Args:
        predicted, expert: robot units.
        valid: steps that count.
        episode: of each chunk, in order.
        every: actions executed of each chunk.
        smooth: dimensions to look at.
    """
    inside = valid[:, :-2] & valid[:, 1:-1] & valid[:, 2:]
    jitters = [np.diff(x[..., smooth], 2, axis=1)[inside] for x in (predicted, expert)]
    last = np.flatnonzero((episode[1:] == episode[:-1]) & valid[:-1, :every].all(1) & valid[1:, 0])
    seams = [x[last + 1, 0][:, smooth] - x[last, every - 1][:, smooth] for x in (predicted, expert)]
    return Roughness(_ratio(*jitters), _ratio(*seams))


def _ratio(predicted: Float[np.ndarray, "k d"], expert: Float[np.ndarray, "k d"]) -> float | None:
    """Median over dimensions of the ratio of root mean squares."""
    if not len(predicted):
        return None
    ours, theirs = (np.sqrt(np.square(x).mean(0)) for x in (predicted, expert))
    moves = theirs > 1e-9
    return float(np.median(ours[moves] / theirs[moves])) if moves.any() else None


class Stream(NamedTuple):
    """The actions that would be executed of an episode, as each chunk replaces the one before, at its own moments."""

    predicted: Float[np.ndarray, "t d"]
    expert: Float[np.ndarray, "t d"]


def streams(predicted: Values, expert: Values, episode: Episodes, lengths: np.ndarray, every: int) -> list[Stream]:
    """The streams of all episodes."""
    found = []
    for e, length in enumerate(lengths.tolist()):
        parts = [x[episode == e, :every].reshape(-1, x.shape[-1])[:length] for x in (predicted, expert)]
        found.append(Stream(*parts))
    return found


def switches(name: str, dim: int, found: Sequence[Stream], window: int) -> list[Switches]:
    """When a gripper closes and opens: the policy's switches nearest to those of the demonstrations.

    A switch is a passage through the middle of the demonstrated range, with a tenth of it as hysteresis.

    Args:
        name: of the dimension.
        dim: its number.
        found: streams of the episodes.
        window: frames within which a switch of the policy belongs to one of the demonstration.
    """
    low, high = np.quantile(np.concatenate([x.expert[:, dim] for x in found]), [0.01, 0.99])
    if high - low < 1e-6:
        return []
    sides = [[_sides(x[:, dim], low, high) for x in each] for each in found]
    begins_high = bool(np.mean([expert[0] for _, expert in sides]) > 0.5)
    results = []
    for motion, upwards in (("closes", not begins_high), ("opens", begins_high)):
        times = [(_times(ours, upwards), _times(theirs, upwards)) for ours, theirs in sides]
        delays = [_delays(ours, theirs, window) for ours, theirs in times]
        if any(delays):
            results.append(_summary(name, motion, sum(len(ours) for ours, _ in times), delays))
    return results


def _summary(name: str, motion: str, own: int, delays: list[list[int | None]]) -> Switches:
    total = sum(map(len, delays))
    matched = [[d for d in each if d is not None] for each in delays]
    everything = np.array([d for each in matched for d in each])
    if not len(everything):
        return Switches(name, motion, total, 0, own, None)
    matched = [each for each in matched if each]
    draws = np.random.default_rng(0).integers(len(matched), size=(DRAWS, len(matched)))
    medians = [np.median([d for i in draw for d in matched[i]]) for draw in draws]
    low, high = np.quantile(medians, [0.025, 0.975])
    interval = Interval(float(np.median(everything)), float(low), float(high))
    return Switches(name, motion, total, len(everything), own, interval)


def _sides(values: np.ndarray, low: float, high: float) -> Bool[np.ndarray, "t"]:
    """Whether the values are in the upper half of a range; between, they are where they were."""
    middle, band = (low + high) / 2, 0.1 * (high - low)
    sides, side = np.empty(len(values), bool), bool(values[0] > middle)
    for i, value in enumerate(values.tolist()):
        side = value > middle - band if side else value > middle + band
        sides[i] = side
    return sides


def _times(sides: Bool[np.ndarray, "t"], upwards: bool) -> np.ndarray:
    """Frames at which the upper half is entered, or left."""
    return 1 + np.flatnonzero((sides[1:] != sides[:-1]) & (sides[1:] == upwards))


def _delays(ours: np.ndarray, theirs: np.ndarray, window: int) -> list[int | None]:
    """For each switch of the demonstration how much later the policy's nearest one is; None: none is near."""
    delays: list[int | None] = []
    for time in theirs.tolist():
        near = ours[np.abs(ours - time) <= window] - time
        delays.append(int(near[np.argmin(np.abs(near))]) if len(near) else None)
    return delays


class Nearest(NamedTuple):
    """The training frames nearest to each chunk's."""

    number: Int[np.ndarray, "n k"]
    """Of the training frame, nearest first."""
    distance: Float[np.ndarray, "n k"]


def nearest(
    features: Float[np.ndarray, "n f"], training: Float[np.ndarray, "m f"], count: int, group: np.ndarray | None = None
) -> Nearest:
    """Nearest training frames by Euclidean distance of features, each scaled by its deviation over training.

    Args:
        features: of the frames.
        training: of the training frames.
        count: of neighbours.
        group: where the frames are the training frames themselves, the episode of each: neighbours are of others.
    """
    scale = np.maximum(training.std(0), 1e-6)
    found = []
    for i, row in enumerate(features):
        distance = np.sqrt(np.square((training - row) / scale).mean(1))
        if group is not None:
            distance[group == group[i]] = np.inf
        order = np.argsort(distance)[:count]
        found.append((order, distance[order]))
    numbers, distances = zip(*found, strict=True)
    return Nearest(np.stack(numbers), np.stack(distances).astype(float))


def nearness(held_out: Nearest, training: Nearest, errors: Float[np.ndarray, "n"], frames: int) -> Nearness:
    """How far held-out frames are from training frames, and whether errors are where that is far.

    Args:
        held_out: neighbours of the chunks' frames.
        training: neighbours of some training frames in other episodes.
        errors: of each chunk.
        frames: training frames that were looked at.
    """
    own, usual = (np.median(x.distance[:, 0][np.isfinite(x.distance[:, 0])]) for x in (held_out, training))
    return Nearness(frames, float(own / max(usual, 1e-9)), rank_correlation(held_out.distance[:, 0], errors))


def rank_correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    ranks = [np.unique(x, return_inverse=True)[1].astype(float) for x in (a, b)]
    if min(x.std() for x in ranks) == 0:
        return 0.0
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _mean(expert: Values, valid: Valid) -> Float[np.ndarray, "1 1 d"]:
    return expert[valid].mean(0)[None, None] if valid.any() else np.zeros((1, 1, expert.shape[-1]))
