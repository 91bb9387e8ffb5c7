"""Demonstrations of one experiment: batches, and what a checkpoint keeps to read a robot's observations alike."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain

from pi0_jax.batch import Batch
from pi0_jax.checkpoint import Assets
from pi0_jax.config import TrainConfig
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.loader import eval_batches, make_loader
from pi0_jax.data.normalize import Stats, compute_stats, stats_from_json, stats_to_json
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import make_transform

_log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """What the loop reads from, and the assets of its checkpoints."""

    robot: Robot
    stats: Stats
    assets: Assets
    loader: grain.DatasetIterator
    """Endless training batches, numpy, uint8 images."""
    validation: Callable[[], Iterator[Batch]] | None
    """Starts one pass over the held-out demonstrations."""


def load_inputs(config: TrainConfig, *, resumed: Assets | None, initial: Assets | None) -> Inputs:
    """Opens the demonstrations.

    Statistics and tokenizer belong to the weights. A resumed run takes both from its checkpoint. A run that starts
    from given weights takes their tokenizer, unless the configuration names one, and statistics of its own data.

    Args:
        config: the experiment.
        resumed: of the checkpoint to resume from.
        initial: of the checkpoint whose weights the run starts from.

    Raises:
        FileNotFoundError, ValueError: no usable dataset or tokenizer; see `pi0_jax.data`.
    """
    robot = get_robot(config.policy.robot)
    dataset = LeRobotDataset(config.data.path)
    if resumed is not None and resumed.norm_stats is not None:
        stats = stats_from_json(resumed.norm_stats)
    else:
        stats = compute_stats(dataset)
    tokenizer = _tokenizer(config, dataset, resumed or initial, keep=resumed is not None)
    transform = make_transform(config.policy, robot, stats, tokenizer)
    _log.info(
        "data: %s, %d episodes, %d frames, %d instructions",
        config.data.path, dataset.num_episodes, dataset.num_frames, len(dataset.tasks),
    )  # fmt: skip
    validation = None
    if config.data.validation_path is not None:
        held_out = LeRobotDataset(config.data.validation_path)
        _log.info("validation: %s, %d frames", config.data.validation_path, held_out.num_frames)
        validation = functools.partial(eval_batches, held_out, transform, config)
        validation()  # decodes the videos, and fails, now rather than in the middle of the run
    assets = Assets(config.policy, stats_to_json(stats), tokenizer.model, config)
    return Inputs(robot, stats, assets, make_loader(dataset, transform, config), validation)


def _tokenizer(config: TrainConfig, dataset: LeRobotDataset, given: Assets | None, *, keep: bool) -> Tokenizer:
    if given is not None and given.tokenizer is not None and (keep or config.data.tokenizer is None):
        return Tokenizer(given.tokenizer, source="the checkpoint's tokenizer")
    if config.data.tokenizer is not None:
        return Tokenizer.from_file(config.data.tokenizer)
    return Tokenizer.train(dataset.tasks, config.policy.model.vocab_size)
