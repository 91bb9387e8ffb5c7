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
from pi0_jax.config import AugmentConfig, DatasetConfig, ModelConfig, TrainConfig
from pi0_jax.data.loader import Loader, eval_batches, make_loader
from pi0_jax.data.mixture import Part, open_part, open_parts
from pi0_jax.data.normalization import Stats, read_stats_file, semantics_from_json, stats_from_json, stats_to_json
from pi0_jax.data.robots import Robot, get_robot, semantics_of
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.stats import compute_group_stats
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


def trained_augment(config: TrainConfig) -> AugmentConfig:
    """How training changes pictures: `fixed_cameras` may name those that `trained_model` leaves out."""
    left_out = set(config.policy.model.cameras) - set(trained_model(config).cameras)
    fixed = tuple(camera for camera in config.augment.fixed_cameras if camera not in left_out)
    return dataclasses.replace(config.augment, fixed_cameras=fixed)


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
    parts = open_parts(config.data, config.policy)
    _check_cameras(config)
    declared = {part.robot.name: semantics_of(part.robot, config.policy.action_semantics) for part in parts}
    semantics = declared if resumed is None else declared | semantics_from_json(resumed.norm_stats or {})
    policy = dataclasses.replace(config.policy, action_semantics=semantics, model=trained_model(config))
    groups = _stats(config, parts, resumed, semantics)
    if robot.name not in groups:
        raise ValueError(
            f"no dataset has statistics called {robot.name!r}, which `policy.robot` needs; there are {sorted(groups)}."
        )
    if config.augment.square_symmetries and len(groups) > 1:
        raise ValueError(
            f"augment.square_symmetries turns vectors by one set of statistics; the datasets have {sorted(groups)}. "
            "Give them one name in `stats`, or turn the symmetries off."
        )
    stats = groups[robot.name]
    tokenizer = _tokenizer(config, parts, resumed or initial, keep=resumed is not None)

    def transformed(some: Sequence[Part]):
        return [(part, make_transform(policy, part.robot, groups[part.stats], tokenizer)) for part in some]

    for part in parts:
        _log.info(
            "data: %s, %d episodes, %d frames, %d instructions",
            part.source.root, len(part.training), _frames(part, part.training), len(part.source.tasks),
        )  # fmt: skip
    held_out = [part for part in parts if len(part.held_out)]
    if config.data.validation_share > 0 and not held_out:
        _log.warning(
            "no episode is held out: data.validation_share %g of so few gave none", config.data.validation_share
        )
    if config.data.validation_path is not None:
        part = open_part(
            DatasetConfig(config.data.validation_path),
            dataclasses.replace(config.data, validation_share=0.0, cache=None),
            config.policy,
        )
        held_out = [part._replace(held_out=part.training, training=part.held_out)]
    validation = None
    if held_out:
        for part in held_out:
            _log.info("validation: %s, %d frames", part.source.root, _frames(part, part.held_out))
        validation = functools.partial(eval_batches, transformed(held_out), config, rows)
        validation()  # decodes the videos, and fails, now rather than in the middle of the run
    assets = Assets(config.policy, stats_to_json(stats, groups, semantics), tokenizer.model, config)
    loader = make_loader(transformed(parts), config, rows)
    return Inputs(robot, stats, assets, loader, validation)


def _frames(part: Part, episodes: np.ndarray) -> int:
    return int(np.diff(part.source.ends, prepend=0)[episodes].sum())


def _stats(
    config: TrainConfig, parts: Sequence[Part], resumed: Assets | None, semantics: dict[str, tuple[str, ...]]
) -> dict[str, Stats]:
    """Statistics by name: those of the checkpoint, of a file, or of the demonstrations."""
    names = list(dict.fromkeys(part.stats for part in parts))
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
        return compute_group_stats(parts, config.policy)
    return {name: stats_from_json(content, name) for name in names}


def _tokenizer(config: TrainConfig, parts: Sequence[Part], given: Assets | None, *, keep: bool) -> Tokenizer:
    if given is not None and given.tokenizer is not None and (keep or config.data.tokenizer is None):
        return Tokenizer(given.tokenizer, source="the checkpoint's tokenizer")
    if config.data.tokenizer is not None:
        return Tokenizer.from_file(config.data.tokenizer)
    texts = [task for part in parts for task in part.source.tasks]
    return Tokenizer.train(texts, config.policy.model.vocab_size)
