"""Batches from a dataset: shuffled and endless for training, in order and once for validation.

Grain reads ahead in threads and keeps the position, so that a run resumes at the very batch where it stopped. An
element is a whole batch: its frames' indices come from a permutation of the epoch, and everything after is a handful
of array operations on the batch, which is what keeps Python out of the way.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from pi0_jax.batch import Batch
from pi0_jax.config import TrainConfig
from pi0_jax.data.lerobot import ACTION, STATE, VALID, LeRobotDataset
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.data.transform import Transform, to_observation

Indices = Int[np.ndarray, "b"]


def make_loader(
    dataset: LeRobotDataset, transform: Transform, config: TrainConfig, shard_index: int = 0, shard_count: int = 1
) -> grain.DatasetIterator:
    """An endless iterator over shuffled training batches, numpy arrays with uint8 images.

    Each epoch has its own order, which depends on `config.seed` alone. Processes that share a batch get consecutive
    parts of it: put together they are the batch that one process would read. Frames without a single step to learn
    are left out.

    The iterator's `get_state()` is a small dict; `set_state()` continues exactly there.

    Args:
        dataset: demonstrations of `config.policy.robot`.
        transform: from `make_transform`.
        config: batch size, seed, robot, horizon, reader threads.
        shard_index: number of this process.
        shard_count: number of processes.

    Raises:
        ValueError: the dataset is not the robot's, the batch cannot be divided, or there is nothing to learn.
    """
    if config.batch_size % shard_count or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be divided for process {shard_index} of {shard_count}. "
            "Choose a `batch_size` that the number of processes divides."
        )
    read = _reader(dataset, transform, config)
    frames = _learnable(dataset, config.policy.model.action_horizon)
    share = config.batch_size // shard_count

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Indices:
        return frames[np.random.default_rng((config.seed, epoch)).permutation(len(frames))]

    def batch(number: int) -> Batch:
        start = number * config.batch_size + shard_index * share
        positions = range(start, start + share)
        return read(np.array([order(p // len(frames))[p % len(frames)] for p in positions]))

    options = grain.ReadOptions(num_threads=config.data.num_threads, prefetch_buffer_size=config.data.prefetch)
    return iter(grain.MapDataset.range(sys.maxsize // config.batch_size).map(batch).to_iter_dataset(options))


def eval_batches(dataset: LeRobotDataset, transform: Transform, config: TrainConfig) -> Iterator[Batch]:
    """All frames once and in order, in batches of `config.batch_size`.

    The last batch is filled up with copies of its last frame whose `step_mask` is False throughout.

    Raises:
        ValueError: the dataset is not the robot's, or there is nothing to learn.
    """
    read = _reader(dataset, transform, config)
    frames = _learnable(dataset, config.policy.model.action_horizon)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(frames), config.batch_size):
            indices = frames[start : start + config.batch_size]
            filling = config.batch_size - len(indices)
            batch = read(np.pad(indices, (0, filling), mode="edge"))
            batch.step_mask[len(indices) :] = False
            yield batch

    return batches()


def _reader(dataset: LeRobotDataset, transform: Transform, config: TrainConfig) -> Callable[[Indices], Batch]:
    """The function from frame indices to their batch."""
    robot, model = get_robot(config.policy.robot), config.policy.model
    _check_dataset(dataset, robot)
    images = {name: dataset.frames(key) for key, name in robot.cameras.items() if name in model.cameras}
    state, tasks = dataset.columns(STATE), np.array(dataset.tasks, object)
    task_index = dataset.columns("task_index")[:, 0]
    dim_mask = np.arange(model.action_dim) < len(robot.actions)

    def read(indices: Indices) -> Batch:
        actions, step_mask = dataset.chunk(indices, model.action_horizon)
        sample = transform.forward(
            {
                "images": {name: frames[indices] for name, frames in images.items()},
                "state": state[indices],
                "prompt": tasks[task_index[indices]],
                "actions": actions,
            }
        )
        masks: dict[str, Any] = {
            "step_mask": step_mask & valid_steps(dataset, indices, model.action_horizon),
            "dim_mask": np.tile(dim_mask, (len(indices), 1)),
        }
        return Batch(to_observation(sample), sample["actions"], **masks)

    return read


def valid_steps(dataset: LeRobotDataset, indices: Indices, horizon: int) -> np.ndarray:
    """False where a step's action must not be learnt, `[b, horizon]`.

    A chunk counts up to its first invalid step: what the expert does after a perturbation answers something that
    nobody could foresee from the chunk's first frame.
    """
    if VALID not in dataset.features:
        return np.ones((len(indices), horizon), bool)
    return np.logical_and.accumulate(dataset.chunk(indices, horizon, VALID)[0][..., 0] > 0, axis=1)


def _learnable(dataset: LeRobotDataset, horizon: int) -> Indices:
    """Frames with at least one step to learn."""
    frames = np.arange(dataset.num_frames)
    steps = dataset.chunk(frames, horizon)[1] & valid_steps(dataset, frames, horizon)
    frames = frames[steps.any(1)]
    if not len(frames):
        raise ValueError(
            f"{dataset.root} has nothing to learn: column {VALID!r} is 0 in all {dataset.num_frames} frames."
        )
    return frames


def _check_dataset(dataset: LeRobotDataset, robot: Robot) -> None:
    if missing := [key for key in robot.cameras if key not in dataset.cameras]:
        raise ValueError(
            f"{dataset.root} lacks video {missing} of {robot.name}; it has {list(dataset.cameras)}. "
            "Set `policy.robot` to the robot of this dataset, or add one in pi0_jax/data/robots."
        )
    for key, names in ((STATE, robot.state), (ACTION, robot.actions)):
        shape = dataset.columns(key).shape[1:]
        if shape != (len(names),):
            raise ValueError(
                f"column {key!r} of {dataset.root} has shape {shape}; {robot.name} has {', '.join(names)}."
            )
    if dataset.fps != robot.fps:
        raise ValueError(
            f"{dataset.root} has {dataset.fps} frames a second; {robot.name} acts at {robot.fps}. "
            "Actions learnt at one rate do not fit another."
        )
