"""Moments of episodes at which the policy is asked for a chunk, and what was demonstrated from there."""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import ModelConfig
from pi0_jax.data.loader import STAGES, BatchReader
from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.source import STATE, Source
from pi0_jax.data.transform import ANCHORS, Sample, Transform

EPISODES = 8
"""Episodes that are looked at even where chunks then have to be further apart than the policy re-plans."""


class Chunks(NamedTuple):
    """Chunks at equal distances through whole episodes, in order."""

    observation: Observation
    """Numpy, images uint8 at the model's resolution."""
    state: Float[np.ndarray, "n d"]
    """Robot units."""
    prompts: np.ndarray
    """Instructions, strings."""
    anchors: dict[str, np.ndarray]
    """States that relative actions refer to, where there are such: `anchor`."""
    expert: Float[np.ndarray, "n ah d"]
    """Demonstrated, normalised, without padding."""
    valid: Bool[np.ndarray, "n ah"]
    """False after the episode's end, and where the demonstration was disturbed on purpose."""
    episode: Int[np.ndarray, "n"]
    """Number of the episode, from 0 among those that were chosen."""
    step: Int[np.ndarray, "n"]
    """Frame within the episode."""
    lengths: Int[np.ndarray, "e"]
    """Frames of each episode."""
    names: list[str]
    """Of the episodes."""
    every: int
    """Frames from one chunk to the next."""


def choose(lengths: Int[np.ndarray, "e"], frames: int, execute: int, horizon: int) -> tuple[np.ndarray, int]:
    """Evenly spaced episodes, and the distance of chunks in them, for about as many chunks as `frames`.

    Args:
        lengths: frames of each episode.
        frames: largest number of chunks, of which one episode may take more.
        execute: frames after which the policy re-plans.
        horizon: length of a chunk, beyond which chunks are never apart.
    """
    few = _evenly(len(lengths), EPISODES)
    every = int(np.clip(-(-lengths[few].sum() // frames), min(execute, horizon), horizon))
    chunks = -(-lengths // every)
    count = int(np.clip(frames // chunks.mean(), 1, len(lengths)))
    while count > 1 and chunks[_evenly(len(lengths), count)].sum() > frames:
        count -= 1
    return _evenly(len(lengths), count), every


def read_chunks(
    datasets: Sequence[OpenDataset],
    transform: Transform,
    model: ModelConfig,
    dims: int,
    frames: int,
    execute: int,
    batch_size: int,
) -> Chunks:
    """Chunks of held-out episodes.

    Args:
        datasets: with at least one held-out episode.
        transform: to the model's arrays.
        model: whose arrays they are, with the cameras that are there alone.
        dims: of the robot's actions.
        frames, execute: as in `choose`.
        batch_size: frames read at once.

    Raises:
        FileNotFoundError, UserError: a dataset cannot be read, or is not its robot's.
    """
    owner = np.concatenate([np.full(len(each.held_out), i) for i, each in enumerate(datasets)])
    number = np.concatenate([each.held_out for each in datasets])
    lengths = np.concatenate([each.source.lengths[each.held_out] for each in datasets])
    chosen, every = choose(lengths, frames, execute, model.action_horizon)
    parts, names = [], []
    with tqdm(total=int((-(-lengths[chosen] // every)).sum()), desc="reading held-out episodes", unit="frame") as bar:
        for i in np.unique(owner[chosen]).tolist():
            source, reader = datasets[i].source, BatchReader(datasets[i], transform, model)
            for e in number[chosen][owner[chosen] == i].tolist():
                names.append(f"{source.root.name}, {source.episodes[e]}")
                first, end = source.episode_range(e)
                rows = np.arange(first, end, every)
                for part in np.split(rows, range(batch_size, len(rows), batch_size)):
                    parts.append((reader(part, np.zeros(len(STAGES))), *_raw(source, part)))
                    bar.update(len(part))
    batches, states, prompts = zip(*parts, strict=True)
    batch: Batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    state, prompt = np.concatenate(states), np.concatenate(prompts)
    sample = encode(transform, state, prompt)
    counts = -(-lengths[chosen] // every)
    seen = batch.observation
    return Chunks(
        observation=seen._replace(images={name: seen.images[name] for name in model.cameras}),  # in their order
        state=state,
        prompts=prompt,
        anchors={key: np.asarray(sample[key]) for key in ANCHORS if key in sample},
        expert=np.asarray(batch.actions)[..., :dims],
        valid=np.asarray(batch.step_mask),
        episode=np.repeat(np.arange(len(chosen)), counts),
        step=np.concatenate([np.arange(count) * every for count in counts]),
        lengths=lengths[chosen],
        names=names,
        every=every,
    )


class TrainingBatch(NamedTuple):
    """Training frames of one dataset."""

    batch: Batch
    member: int
    """Number of the dataset."""
    rows: Int[np.ndarray, "b"]
    """Its frames."""


def training_batches(
    datasets: Sequence[OpenDataset],
    transform: Transform,
    model: ModelConfig,
    count: int,
    batch_size: int,
    rng: np.random.Generator,
) -> Iterator[TrainingBatch]:
    """About `count` evenly spaced training frames in random order; other arguments and errors as of `read_chunks`."""
    chosen = []
    for dataset in datasets:
        rows = np.arange(dataset.source.num_frames)
        rows = rows[np.isin(dataset.source.episode_of(rows), dataset.training)]
        chosen.append(rng.permutation(rows[_evenly(len(rows), max(1, count // len(datasets)))]))
    with tqdm(total=sum(map(len, chosen)), desc="training frames", unit="frame") as bar:
        for member, (dataset, rows) in enumerate(zip(datasets, chosen, strict=True)):
            reader = BatchReader(dataset, transform, model)
            for part in np.split(rows, range(batch_size, len(rows), batch_size)):
                yield TrainingBatch(reader(part, np.zeros(len(STAGES))), member, part)
                bar.update(len(part))


def encode(transform: Transform, state: Float[np.ndarray, "n d"], prompts: np.ndarray) -> Sample:
    """The model's arrays without images: state, tokens, and the anchors of relative actions."""
    parts = []
    for rows in np.split(np.arange(len(state)), range(64, len(state), 64)):  # black images are made on the way
        sample = transform.forward({"images": {}, "state": state[rows], "prompt": prompts[rows]})
        names = ("state", "prompt", "prompt_mask", *ANCHORS)
        parts.append({name: np.asarray(sample[name]) for name in names if name in sample})
    return cast(Sample, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def in_batches(function: Callable[..., Any], size: int, title: str) -> Callable[..., np.ndarray]:
    """The function of arrays with examples along the first axis, in batches of one size; a bar if they are many."""

    def run(*inputs: Any) -> np.ndarray:
        count, parts = len(jax.tree.leaves(inputs)[0]), []
        for start in tqdm(range(0, count, size), desc=title, unit="batch", disable=count <= size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            parts.append(np.asarray(function(*jax.tree.map(lambda x: x[rows], inputs)))[: count - start])
        return np.concatenate(parts)

    return run


def _raw(source: Source, rows: Int[np.ndarray, "b"]) -> tuple[np.ndarray, np.ndarray]:
    """States and instructions of some frames."""
    prompts = np.array([source.task(row) for row in rows], object)
    return np.asarray(source.columns(STATE)[rows], np.float32), prompts


def _evenly(count: int, most: int) -> Int[np.ndarray, "n"]:
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
