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
from pi0_jax.config import DataConfig, DatasetConfig, PolicyConfig, TrainConfig
from pi0_jax.data.augment import augment
from pi0_jax.data.loader import Loader, eval_batches, make_loader
from pi0_jax.data.mixture import Part, open_part, open_parts
from pi0_jax.data.normalization import Stats, read_stats_file, semantics_from_json, stats_from_json, stats_to_json
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.stats import compute_group_stats
from pi0_jax.data.transform import make_transform
from pi0_jax.errors import UserError
from pi0_jax.training.resolve import Run
from pi0_jax.training.step import Augment

_log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """What the loop reads from, and the assets of its checkpoints."""

    stats: Stats
    """Statistics that the policy's robot is normalised by."""
    assets: Assets
    loader: Loader
    """Endless training batches, numpy, uint8 images; this process's part of them."""
    validation: Callable[[], Iterator[Batch]] | None
    """Starts one pass over the held-out demonstrations, this process's part of each batch."""
    augment: Augment
    """Random changes to a batch."""


def load_inputs(run: Run, *, resumed: Assets | None = None, initial: Assets | None = None) -> Inputs:
    """Opens the demonstrations.

    Statistics and tokenizer belong to the weights. A resumed run takes both from its checkpoint. A run that starts
    from given weights takes their tokenizer, unless the configuration names one, and statistics of its own data.

    Args:
        run: of `resolve`.
        resumed: of the checkpoint to resume from.
        initial: of the checkpoint whose weights the run starts from.

    Raises:
        FileNotFoundError, UserError: no usable dataset or tokenizer; see `pi0_jax.data`.
    """
    config, robot = run.config, run.robot
    parts = open_parts(config.data, config.policy)
    semantics = run.policy.action_semantics
    if resumed is not None:
        semantics = semantics | semantics_from_json(resumed.norm_stats or {})
    policy = dataclasses.replace(run.policy, action_semantics=semantics)
    groups = _stats(config, parts, resumed, semantics)
    if robot.name not in groups:
        raise UserError(
            f"no dataset has statistics called {robot.name!r}, which `policy.robot` needs; there are {sorted(groups)}."
        )
    if config.augment.square_symmetries and len(groups) > 1:
        raise UserError(
            f"augment.square_symmetries turns vectors by one set of statistics; the datasets have {sorted(groups)}. "
            "Give them one name in `stats`, or turn the symmetries off."
        )
    stats = groups[robot.name]
    tokenizer = _tokenizer(config, parts, resumed or initial, keep=resumed is not None)

    def transformed(datasets: Sequence[Part]):
        return [(part, make_transform(policy, part.robot, groups[part.stats], tokenizer)) for part in datasets]

    for part in parts:
        _log.info(
            "data: %s, %d episodes, %d frames, %d instructions",
            part.source.root,
            len(part.training),
            _frames(part, part.training),
            len(part.source.tasks),
        )
    validation = None
    if held_out := open_held_out(config.data, config.policy, parts):
        for part in held_out:
            _log.info("validation: %s, %d frames", part.source.root, _frames(part, part.held_out))
        validation = functools.partial(eval_batches, transformed(held_out), config, run.rows)
        validation()  # decodes the videos, and fails, now rather than in the middle of the run
    return Inputs(
        stats=stats,
        assets=Assets(config.policy, stats_to_json(stats, groups, semantics), tokenizer.model, config),
        loader=make_loader(transformed(parts), config, run.rows),
        validation=validation,
        augment=functools.partial(
            augment, config=config.augment, robot=robot, stats=stats, mode=config.policy.normalization
        ),
    )


def open_held_out(data: DataConfig, policy: PolicyConfig, parts: Sequence[Part] | None = None) -> list[Part]:
    """Held-out demonstrations of a run, as training opens them; `Part.held_out` are their episodes.

    Args:
        data, policy: of the run; a checkpoint's assets have both.
        parts: its datasets where they are open already.

    Returns:
        A dataset per entry, under its robot's names; empty where nothing is held out.

    Raises:
        FileNotFoundError, UserError: a dataset cannot be read.
    """
    if data.validation_path is not None:
        alone = dataclasses.replace(data, validation_share=0.0, cache=None)
        part = open_part(DatasetConfig(data.validation_path), alone, policy)
        return [part._replace(held_out=part.training, training=part.held_out)]
    if not data.validation_share:
        return []
    parts = open_parts(data, policy) if parts is None else parts
    held_out = [part for part in parts if len(part.held_out)]
    if not held_out:
        _log.warning("no episode is held out: data.validation_share %g of so few is none", data.validation_share)
    return held_out


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
                raise UserError(
                    f"{config.data.norm_stats} was computed for actions of {name} that are {kinds}; they are "
                    f"{semantics[name]} here. Compute the statistics again: pi0 data stats"
                )
    else:
        return compute_group_stats(parts, config.policy)
    return {name: stats_from_json(content, name) for name in names}


def _tokenizer(config: TrainConfig, parts: Sequence[Part], weights: Assets | None, *, keep: bool) -> Tokenizer:
    """The tokenizer of the weights, of the configuration, or one trained on the instructions.

    Args:
        config: the experiment.
        parts: datasets with instructions.
        weights: assets of the checkpoint whose weights the run has; None: random weights.
        keep: whether the configuration may not name another.
    """
    if weights is not None and weights.tokenizer is not None and (keep or config.data.tokenizer is None):
        return Tokenizer(weights.tokenizer, source="the checkpoint's tokenizer")
    if config.data.tokenizer is not None:
        return Tokenizer.from_file(config.data.tokenizer)
    texts = [task for part in parts for task in part.source.tasks]
    return Tokenizer.train(texts, config.policy.model.vocab_size)
