"""Batches from datasets: shuffled and endless for training, in order and once for validation.

Grain reads ahead, in threads and, where asked, in processes, and the position is the number of the next batch, so that
a run resumes at the very batch where it stopped, with any number of either. An element is a whole batch: its samples'
places come from a `Stream`, and everything after is a handful of array operations on the batch, which is what keeps
Python out of the way.
"""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from pi0_jax.batch import Batch
from pi0_jax.config import ModelConfig, TrainConfig
from pi0_jax.data.mixture import FrameOrder, OpenDataset, Stream
from pi0_jax.data.rates import same_rate
from pi0_jax.data.robots import Robot
from pi0_jax.data.source import ACTION, STATE, VALID, Source, text_of
from pi0_jax.data.transform import Transform, to_observation
from pi0_jax.errors import UserError

Indices = Int[np.ndarray, "b"]
_SHARED = grain.experimental.DatasetOptions(min_shm_size=2**18)
"""A block of shared memory for each small array costs more than copying it."""
STAGES = ("columns", "pictures", "transform")
"""What preparing a batch consists of: numbers and chunks; reading and decoding pictures; resizing and tokens."""


class Loader:
    """An endless iterator over training batches that knows where it is and how long it made its caller wait.

    `prepare` gives the batch of a number, and the seconds of each stage. Each of the `num_workers` processes (0: this
    one) has `num_threads` reader threads, and prepares `prefetch` batches ahead.
    """

    def __init__(self, prepare: _Prepare, num_workers: int, num_threads: int, prefetch: int):
        self._prepare, self._workers, self._prefetch = prepare, num_workers, prefetch
        self._options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._start = 0
        self._iterator: grain.DatasetIterator | None = None
        self._waited, self._since = 0.0, time.perf_counter()
        self._spent = np.zeros(len(STAGES))

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if self._iterator is None:
            self._iterator = self._open()
        batch, spent = next(self._iterator)
        self._start += 1
        self._spent += spent
        self._waited += time.perf_counter() - begin
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, a small dict."""
        return {"next_index": self._start}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues exactly where `get_state` was asked."""
        self._start = int(state["next_index"])
        self.close()

    def close(self) -> None:
        """Ends worker processes and threads; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def gauges(self) -> dict[str, float]:
        """Since this was asked last: `input_wait`, the share of the time that was spent waiting for batches; and the
        share of each stage in what preparing them took, all workers together."""
        now, total = time.perf_counter(), max(self._spent.sum(), 1e-9)
        gauges = {"input_wait": self._waited / max(now - self._since, 1e-9)}
        gauges |= {f"input_{name}": float(spent / total) for name, spent in zip(STAGES, self._spent, strict=True)}
        self._waited, self._since = 0.0, now
        self._spent = np.zeros(len(STAGES))
        return gauges

    def _open(self) -> grain.DatasetIterator:
        batches = grain.MapDataset.range(self._start, sys.maxsize // 2).map(self._prepare)
        ahead = batches.to_iter_dataset(self._options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain's processes read a flag, and ours is no absl program
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._workers, max(1, self._prefetch // 2))
            ahead = grain.experimental.WithOptionsIterDataset(ahead, _SHARED).mp_prefetch(options)
        return iter(ahead)


def make_loader(
    datasets: Sequence[tuple[OpenDataset, Transform]], config: TrainConfig, rows: Indices | None = None
) -> Loader:
    """An endless iterator over shuffled training batches, numpy arrays with uint8 images.

    Each epoch of a dataset has its own order, which depends on `config.seed` alone. Processes that share a batch ask
    for rows of the batch that one process would read. Frames without a single step to learn are left out.

    The iterator's `get_state()` is a small dict; `set_state()` continues exactly there. Each of the `datasets` comes
    with the transform of its robot and statistics. `rows` are the examples of each batch that this process needs; None:
    all.

    Raises:
        UserError: a dataset is not its robot's, or there is nothing to learn; prompt buckets that are none.
    """
    _check_buckets(config)
    mixed = not all(dataset.source.has_actions for dataset, _ in datasets)
    readers = [BatchReader(dataset, transform, config.policy.model, mixed) for dataset, transform in datasets]
    frames = [learnable_frames(dataset.source, dataset.training, dataset.sampled) for dataset, _ in datasets]
    orders = []
    for number, ((dataset, _), own) in enumerate(zip(datasets, frames, strict=True)):
        shards = dataset.source.shard_ends if config.data.shuffle == "shards" else None
        orders.append(FrameOrder(own, config.seed, number, shards, config.data.shuffle_window))
    weights = [dataset.weight for dataset, _ in datasets if dataset.weight is not None] or None
    stream = Stream(orders, [len(own) for own in frames], weights, config.seed)
    data, wanted = config.data, np.arange(config.batch_size) if rows is None else rows
    prepare = _Prepare(readers, stream, config.batch_size, wanted, data.prompt_buckets)
    return Loader(prepare, data.num_workers, data.num_threads, data.prefetch)


class _Prepare:
    """From the number of a batch to this process's part of it, and the seconds of each stage."""

    def __init__(
        self, readers: list[BatchReader], stream: Stream, batch_size: int, rows: Indices, buckets: Sequence[int]
    ):
        self._readers, self._stream, self._batch_size, self._rows = readers, stream, batch_size, rows
        self._buckets = buckets

    def __call__(self, number: int) -> tuple[Batch, np.ndarray]:
        members, frames = self._stream(number * self._batch_size + self._rows)
        seconds = np.zeros(len(STAGES))
        batch = self._batch(members, frames, seconds)
        if not self._buckets:
            return batch, seconds
        if len(self._rows) < self._batch_size:  # the longest prompt may be another process's
            members, frames = self._stream(number * self._batch_size + np.arange(self._batch_size))
            lengths = [self._readers[m].prompt_lengths(frames[members == m]).max() for m in np.unique(members)]
        else:
            lengths = batch.observation.prompt_mask.sum(1)
        return shorten_prompts(batch, int(max(lengths)), self._buckets), seconds

    def _batch(self, members: Indices, frames: Indices, seconds: np.ndarray) -> Batch:
        batches, places = [], []
        for member in np.unique(members).tolist():
            places.append(np.flatnonzero(members == member))
            batches.append(self._readers[member](frames[places[-1]], seconds))
        if len(batches) == 1:
            return batches[0]
        back = np.argsort(np.concatenate(places))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *batches)


def shorten_prompts(batch: Batch, longest: int, buckets: Sequence[int]) -> Batch:
    """The batch with prompts of the first length of `buckets` that holds `longest` tokens; unchanged if none does."""
    length = next((bucket for bucket in buckets if bucket >= longest), None)
    prompt, mask = batch.observation.prompt[:, :length], batch.observation.prompt_mask[:, :length]
    return batch._replace(observation=batch.observation._replace(prompt=prompt, prompt_mask=mask))


def _check_buckets(config: TrainConfig) -> None:
    buckets, most = config.data.prompt_buckets, config.policy.model.prompt_length
    if list(buckets) != sorted(set(buckets)) or not all(0 < bucket <= most for bucket in buckets):
        raise UserError(
            f"data.prompt_buckets is {list(buckets)}; expected ascending lengths from 1 to the model's prompt_length, "
            f"{most}, which is used where a prompt is longer than all of them."
        )


def eval_batches(
    datasets: Sequence[tuple[OpenDataset, Transform]], config: TrainConfig, rows: Indices | None = None
) -> Iterator[Batch]:
    """All held-out frames once and in order, in batches of `config.batch_size`, or the given rows of each.

    The last batch of each dataset is filled up with copies of its last frame whose `step_mask` is False throughout.

    Raises:
        UserError: a dataset is not its robot's, or there is nothing to learn.
    """
    readers = [BatchReader(dataset, transform, config.policy.model) for dataset, transform in datasets]
    frames = [learnable_frames(dataset.source, dataset.held_out) for dataset, _ in datasets]
    wanted = np.arange(config.batch_size) if rows is None else rows

    def batches() -> Iterator[Batch]:
        for reader, own in zip(readers, frames, strict=True):
            for start in range(0, len(own), config.batch_size):
                indices = own[start : start + config.batch_size]
                filling = config.batch_size - len(indices)
                batch = reader(np.pad(indices, (0, filling), mode="edge")[wanted], np.zeros(len(STAGES)))
                batch.step_mask[wanted >= len(indices)] = False
                if buckets := config.data.prompt_buckets:
                    batch = shorten_prompts(batch, int(reader.prompt_lengths(indices).max()), buckets)
                yield batch

    return batches()


class BatchReader:
    """From frames of one dataset to their batch, which says whether it has actions if it is `mixed` with pairs."""

    def __init__(self, dataset: OpenDataset, transform: Transform, model: ModelConfig, mixed: bool = False):
        self._mixed = mixed
        self._source, self._cameras, self._transform = dataset.source, dataset.cameras, transform
        if dataset.source.has_actions:
            _check_dataset(dataset.source, dataset.robot)
        self._horizon = model.action_horizon
        self._dim_mask = np.arange(model.action_dim) < len(dataset.robot.model_actions)
        self._read_first()
        self._seen = {camera: self._source.camera_mask(feature) for feature, camera in self._cameras.items()}

    @functools.cached_property
    def _tasks(self) -> np.ndarray:
        return np.array(self._source.tasks, object)

    def _read_first(self) -> None:
        """Reads a picture of each camera, so that what is missing is an error now rather than later, and all packages
        are imported before there are several threads: importing TensorFlow Datasets exchanges Python's `__import__` for
        moments, and what other threads import then may fail."""
        for feature in self._cameras:
            self._source.images(feature, np.array([0]))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tasks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read_first()

    def prompt_lengths(self, rows: Indices) -> Indices:
        """Tokens of the prompt of each row."""
        state, prompts = self._source.values(STATE, rows), self._tasks[self._source.task_numbers(rows)]
        text = np.array([text_of(prompt) for prompt in prompts], object)
        sample = self._transform.forward({"images": {}, "state": state, "prompt": prompts, "text": text})
        return sample["prompt_mask"].sum(-1)

    def __call__(self, rows: Indices, seconds: np.ndarray) -> Batch:
        """The batch of `rows`; adds the time that each stage took to `seconds`."""
        marks = [time.perf_counter()]
        actions, step_mask = self._source.chunk(rows, self._horizon)
        step_mask &= valid_steps(self._source, rows, self._horizon) & self._source.has_actions
        state, prompts = self._source.values(STATE, rows), self._tasks[self._source.task_numbers(rows)]
        has_actions = np.full(len(rows), self._source.has_actions)
        marks.append(time.perf_counter())
        images = {camera: self._source.images(feature, rows) for feature, camera in self._cameras.items()}
        marks.append(time.perf_counter())
        episodes = self._source.episode_of(rows)
        masks = {camera: seen[episodes] for camera, seen in self._seen.items()}
        sample = self._transform.forward(
            {
                "images": images,
                "image_masks": masks,
                "state": state,
                "prompt": prompts,
                "text": np.array([text_of(prompt) for prompt in prompts], object),
                "actions": actions,
                "has_actions": has_actions,
                "step_mask": step_mask,
            }
        )
        arrays: Any = sample["actions"], step_mask, np.tile(self._dim_mask, (len(rows), 1))  # numpy until placed
        batch = Batch(to_observation(sample), *arrays)._replace(targets=sample.get("targets"))
        if self._mixed:
            batch = batch._replace(has_actions=has_actions)
        seconds += np.diff([*marks, time.perf_counter()])
        return batch


def valid_steps(source: Source, indices: Indices, horizon: int) -> np.ndarray:
    """False where a step's action must not be learnt, `[b, horizon]`.

    A chunk counts up to its first invalid step: what the expert does after a perturbation answers something that
    nobody could foresee from the chunk's first frame.
    """
    if VALID not in source.features:
        return np.ones((len(indices), horizon), bool)
    return np.logical_and.accumulate(source.chunk(indices, horizon, VALID)[0][..., 0] > 0, axis=1)


def learnable_frames(source: Source, episodes: np.ndarray, sampled: np.ndarray | None = None) -> Indices:
    """Frames of some episodes with at least one step to learn: those whose own step is one. None: all are sampled."""
    frames = np.arange(source.num_frames) if sampled is None else sampled
    if len(episodes) < source.num_episodes:
        frames = frames[np.isin(source.episode_of(frames), episodes)]
    if VALID in source.features:
        frames = frames[source.columns(VALID)[frames, 0] > 0]
    if not len(frames):
        raise UserError(
            f"{source.root} has nothing to learn: of its {source.num_episodes} episodes {len(episodes)} are asked for"
            + (f", and column {VALID!r} is 0 in all their frames." if VALID in source.features else ".")
        )
    return frames


def _check_dataset(source: Source, robot: Robot) -> None:
    describe = f"For a robot file that fits: pi0 data robot {source.root}"
    if missing := [key for key in robot.cameras if key not in source.cameras]:
        raise UserError(
            f"{source.root} lacks video {missing} of {robot.name}; it has {list(source.cameras)}. {describe}, or name "
            "its cameras in the dataset's `keys`."
        )
    for key, names in ((STATE, robot.state), (ACTION, robot.actions)):
        shape = source.values(key, np.zeros(1, int)).shape[1:]
        if shape != (len(names),):
            raise UserError(
                f"column {key!r} of {source.root} has shape {shape}; {robot.name} has {len(names)}: "
                f"{', '.join(names)}. {describe}."
            )
    if robot.fps is not None and not same_rate(source.fps, robot.fps):
        raise UserError(
            f"{source.root} has {source.fps} frames per second; {robot.name} acts at {robot.fps}. Actions learnt at "
            f"one rate do not fit another. --data.resample-fps {robot.fps:g} brings the dataset to that rate. "
            f"{describe}."
        )
