"""Demonstrations of one experiment: batches, and what a checkpoint keeps to read a robot's observations alike."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pi0_jax.batch import Batch
from pi0_jax.checkpoint import Assets
from pi0_jax.config import DatasetConfig, ModelConfig, TrainConfig
from pi0_jax.data.loader import Loader, eval_batches, make_loader
from pi0_jax.data.mixture import OpenDataset, open_dataset, open_datasets
from pi0_jax.data.normalization import (
    Normalization,
    Stats,
    normalization_from_json,
    read_stats_file,
    semantics_from_json,
    stats_to_json,
)
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.data.transform import make_transform

_log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """What the loop reads from, and the assets of its checkpoints."""

    robot: Robot
    stats: Stats
    assets: Assets
    loader: Loader
    """Endless training batches, numpy, uint8 images; this process's part of them."""
    validation: Callable[[], Iterator[Batch]] | None
    """Starts one pass over the held-out demonstrations, this process's part of each batch."""


def trained_model(config: TrainConfig) -> ModelConfig:
    """The model as training computes it: without the cameras that no robot of the run has.

    Their tokens would be masked, and what is masked changes no other token; no parameter belongs to a camera.
    """
    model, there = config.policy.model, _robots_cameras(config)
    return dataclasses.replace(model, cameras=tuple(camera for camera in model.cameras if camera in there))


def _robots_cameras(config: TrainConfig) -> list[str]:
    robots = [config.policy.robot, *(dataset.robot or config.policy.robot for dataset in config.data.datasets)]
    return sorted({camera for name in robots for camera in get_robot(name).cameras.values()})


def _check_cameras(config: TrainConfig) -> None:
    """Says which cameras the run has, and refuses none at all.

    Raises:
        ValueError: the model has cameras, and no robot has any of them.
    """
    asked, used, has = config.policy.model.cameras, trained_model(config).cameras, _robots_cameras(config)
    if asked and not used:
        raise ValueError(
            f"none of the model's cameras, {list(asked)}, is one of the robot's, {has}. Name at least one of those in "
            "`policy.model.cameras`."
        )
    missing, left_out = [name for name in asked if name not in used], [name for name in has if name not in used]
    _log.info("cameras: %s", ", ".join(used) or "none")
    if missing and left_out:
        _log.warning(
            "policy.model.cameras names %s, which no robot of this run has, and leaves out %s, which there are",
            ", ".join(missing), ", ".join(left_out),
        )  # fmt: skip


def load_inputs(
    config: TrainConfig, *, resumed: Assets | None, initial: Assets | None, rows: np.ndarray | None = None
) -> Inputs:
    """Opens the demonstrations.

    Statistics and tokenizer belong to the weights. A resumed run takes both from its checkpoint. A run that starts
    from given weights takes their tokenizer, unless the configuration names one, and statistics of its own data.

    Args:
        config: the experiment.
        resumed: of the checkpoint to resume from.
        initial: of the checkpoint whose weights the run starts from.
        rows: of each batch, the examples that this process needs (`sharding.local_rows`); None: all.

    Raises:
        FileNotFoundError, ValueError: no usable dataset or tokenizer; see `pi0_jax.data`.
    """
    robot = get_robot(config.policy.robot)
    kept = {} if resumed is None else semantics_from_json(resumed.norm_stats or {})
    policy = dataclasses.replace(config.policy, action_semantics=config.policy.action_semantics | kept)
    datasets = open_datasets(config.data, policy)
    _check_cameras(config)
    policy = dataclasses.replace(policy, model=trained_model(config))
    groups = _normalizations(config, datasets, resumed)
    if robot.name not in groups:
        raise ValueError(
            f"no dataset has statistics called {robot.name!r}, which `policy.robot` needs; there are {sorted(groups)}."
        )
    if config.augment.square_symmetries and len(groups) > 1:
        raise ValueError(
            f"augment.square_symmetries turns vectors by one set of statistics; the datasets have {sorted(groups)}. "
            "Give them one name in `stats`, or turn the symmetries off."
        )
    stats = groups[robot.name].stats
    semantics = {dataset.robot.name: dataset.semantics for dataset in datasets}
    tokenizer = _tokenizer(config, datasets, resumed or initial, keep=resumed is not None)

    def transformed(some: Sequence[OpenDataset]):
        return [(each, make_transform(policy, each.robot, groups[each.stats], tokenizer)) for each in some]

    for part in datasets:
        _log.info(
            "data: %s, %d episodes, %d frames, %d instructions",
            part.source.root, len(part.training), _frames(part, part.training), len(part.source.tasks),
        )  # fmt: skip
    held_out = [part for part in datasets if len(part.held_out)]
    if config.data.validation_share > 0 and not held_out:
        _log.warning(
            "no episode is held out: data.validation_share %g of so few gave none", config.data.validation_share
        )
    if config.data.validation_path is not None:
        part = open_dataset(
            DatasetConfig(config.data.validation_path),
            dataclasses.replace(config.data, validation_share=0.0, cache=None),
            policy,
        )
        held_out = [part._replace(held_out=part.training, training=part.held_out)]
    validation = None
    if held_out:
        for part in held_out:
            _log.info("validation: %s, %d frames", part.source.root, _frames(part, part.held_out))
        validation = functools.partial(eval_batches, transformed(held_out), config, rows)
        validation()  # decodes the videos, and fails, now rather than in the middle of the run
    assets = Assets(config.policy, stats_to_json(stats, groups, semantics), tokenizer.model, config)
    loader = make_loader(transformed(datasets), config, rows)
    return Inputs(robot, stats, assets, loader, validation)


def _frames(part: OpenDataset, episodes: np.ndarray) -> int:
    return int(np.diff(part.source.ends, prepend=0)[episodes].sum())


def _normalizations(
    config: TrainConfig, datasets: Sequence[OpenDataset], resumed: Assets | None
) -> dict[str, Normalization]:
    """Statistics by name: those of the checkpoint, of a file, or of the demonstrations."""
    semantics = {dataset.robot.name: dataset.semantics for dataset in datasets}
    if resumed is not None and resumed.norm_stats is not None:
        content = resumed.norm_stats
    elif config.data.norm_stats is not None:
        content = read_stats_file(config.data.norm_stats)
        for name, kinds in semantics_from_json(content).items():
            if name in semantics and kinds != semantics[name]:
                raise ValueError(
                    f"{config.data.norm_stats} was computed for actions of {name} that are {kinds}; they are "
                    f"{semantics[name]} here. Compute the statistics again: pi0 data stats"
                )
    else:
        return compute_normalizations(datasets, config.policy.model.action_horizon)
    return {each.stats: normalization_from_json(content, each.robot, semantics, each.stats) for each in datasets}


def _tokenizer(config: TrainConfig, datasets: Sequence[OpenDataset], given: Assets | None, *, keep: bool) -> Tokenizer:
    if given is not None and given.tokenizer is not None and (keep or config.data.tokenizer is None):
        return Tokenizer(given.tokenizer, source="the checkpoint's tokenizer")
    if config.data.tokenizer is not None:
        return Tokenizer.from_file(config.data.tokenizer)
    texts = [task for each in datasets for task in each.source.tasks]
    return Tokenizer.train(texts, config.policy.model.vocab_size)
