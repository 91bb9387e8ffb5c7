"""Demonstrations of one experiment: batches, and what a checkpoint keeps to read a robot's observations alike."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pi0_jax.batch import Batch
from pi0_jax.checkpoint import Assets
from pi0_jax.config import AugmentConfig, DataConfig, DatasetConfig, PolicyConfig, TrainConfig
from pi0_jax.data.augment import make_augment
from pi0_jax.data.fast import FastCodec
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
from pi0_jax.data.pairs import IMAGE, PairsDataset
from pi0_jax.data.robot_json import robot_to_json
from pi0_jax.data.source import text_of
from pi0_jax.data.targets import check_shape, target_transform
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.fit_codec import fit_codec
from pi0_jax.data.tools.given import SHOWN, fit_given, some_episodes
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.data.transform import make_pairs_transform, make_transform
from pi0_jax.errors import UserError, listed
from pi0_jax.training.resolve import Run
from pi0_jax.training.step import Augment

FEWEST_TOKENS = 512
"""Tokens that a vocabulary trained on the instructions has room for, at least, beside action tokens."""

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
    kept = {} if resumed is None else semantics_from_json(resumed.norm_stats or {})
    policy = dataclasses.replace(run.policy, action_semantics=run.policy.action_semantics | kept)
    datasets = open_datasets(config.data, policy, pictures=True)
    for each in datasets:
        if isinstance(each.source, PairsDataset) and each.source.has_boxes:
            _check_boxes(config.augment, each.cameras[IMAGE])
    groups = _normalizations(config, datasets, resumed)
    if robot.name not in groups:
        raise UserError(
            f"no dataset has statistics called {robot.name!r}, which `policy.robot` needs; there are {sorted(groups)}."
        )
    if config.augment.square_symmetries and len(groups) > 1:
        raise UserError(
            f"augment.square_symmetries turns vectors by one set of statistics; the datasets have {sorted(groups)}. "
            "Give them one name in `stats`, or turn the symmetries off."
        )
    stats = groups[robot.name].stats
    semantics = {dataset.robot.name: dataset.semantics for dataset in datasets}
    codec = _codec(config, datasets, groups, resumed or initial, keep=resumed is not None)
    tokenizer = _tokenizer(config, datasets, resumed or initial, codec, keep=resumed is not None)
    targets = target_transform(policy, tokenizer, codec, _texts(datasets))
    if not policy.subtask_every and any(text_of(t) for d in datasets if d.source.has_actions for t in d.source.tasks):
        _log.warning(
            "the policy learns to write a subtask before it acts, and policy.subtask_every is 0: it would act without. "
            "Set --policy.subtask-every 1, or later `pi0 serve --subtask-every` and `pi0 evaluate --subtask-every`"
        )

    def transform_of(each: OpenDataset):
        if not each.source.has_actions:
            return make_pairs_transform(policy, each.robot, tokenizer, targets)
        return make_transform(policy, each.robot, groups[each.stats], tokenizer, targets)

    def transformed(datasets: Sequence[OpenDataset]):
        return [(each, transform_of(each)) for each in datasets]

    for each in datasets:
        counts = len(each.training), _frames(each, each.training), len(each.source.tasks)
        _log.info("data: %s, %d episodes, %d frames, %d instructions", each.source.root, *counts)
    validation = None
    if held_out := open_held_out(config.data, policy, datasets):
        for each in held_out:
            _log.info("validation: %s, %d frames", each.source.root, _frames(each, each.held_out))
        validation = functools.partial(eval_batches, transformed(held_out), config, run.rows)
        validation()  # decodes the videos, and fails, now rather than in the middle of the run
    return Inputs(
        stats=stats,
        assets=Assets(
            config.policy,
            stats_to_json(stats, groups, semantics),
            tokenizer.model,
            config,
            robot_to_json(config.policy.robot),
            codec and codec.files(),
        ),
        loader=make_loader(transformed(datasets), config, run.rows),
        validation=validation,
        augment=make_augment(config.augment, robot, stats, policy.normalization, config.policy.model.cameras),
    )


def open_held_out(
    data: DataConfig, policy: PolicyConfig, datasets: Sequence[OpenDataset] | None = None
) -> list[OpenDataset]:
    """Held-out demonstrations of a run, as training opens them; `OpenDataset.held_out` are their episodes.

    Args:
        data, policy: of the run; a checkpoint's assets have both.
        datasets: those of the run, where they are open already.

    Raises:
        FileNotFoundError, UserError: a dataset cannot be read.
    """
    if data.validation_path is not None:
        alone = dataclasses.replace(data, validation_share=0.0, cache=None)
        held_out = DatasetConfig(data.validation_path)
        if data.datasets:  # prompts as in training
            held_out = dataclasses.replace(held_out, prompt_from=data.datasets[0].prompt_from)
        each = open_dataset(held_out, alone, policy)
        return [each._replace(held_out=each.training, training=each.held_out)]
    if not data.validation_share:
        return []
    datasets = open_datasets(data, policy) if datasets is None else datasets
    held_out = [each for each in datasets if len(each.held_out)]
    if not held_out:
        _log.warning("no episode is held out: data.validation_share %g of so few is none", data.validation_share)
    return held_out


def _check_boxes(augment: AugmentConfig, camera: str) -> None:
    moves = augment.crop < 1 or augment.rotate_degrees or augment.square_symmetries
    if moves and (augment.square_symmetries or camera not in augment.fixed_cameras):
        raise UserError(
            f"image-text pairs have boxes, and augment moves the picture of {camera!r} that they are places in: take "
            f"crop and rotation away, or name the camera in augment.fixed_cameras."
        )


def _frames(dataset: OpenDataset, episodes: np.ndarray) -> int:
    return int(dataset.source.lengths[episodes].sum())


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
                raise UserError(
                    f"{config.data.norm_stats} was computed for actions of {name} that are {kinds}; they are "
                    f"{semantics[name]} here. Compute the statistics again: pi0 data stats"
                )
    else:
        return compute_normalizations(datasets, config.policy.model.action_horizon, sampled=True)
    found = {each.stats: normalization_from_json(content, each.robot, semantics, each.stats) for each in datasets}
    if resumed is None or resumed.norm_stats is None:
        for each in (each for each in datasets if each.source.has_actions):
            _check_given(each, found[each.stats].stats, config)
    return found


def _check_given(dataset: OpenDataset, stats: Stats, config: TrainConfig) -> None:
    """Refuses statistics of a file that some of the demonstrations are far off, unless they are trusted."""
    policy, episodes = config.policy, some_episodes(dataset)
    if not len(episodes):
        return
    fit = fit_given(dataset, stats, policy.normalization, policy.model.action_horizon, episodes)
    what = f"{config.data.norm_stats} normalises {len(episodes)} episodes of {dataset.source.root}"
    _log.info("%s: %.0f %% of the values outside [-1, 1], the largest %.3g", what, 100 * fit.outside, fit.largest)
    if not fit.far_off:
        return
    found = f"{what} far off: {listed(fit.far_off, SHOWN)}"
    if config.data.trust_norm_stats:
        _log.warning("%s; data.trust_norm_stats is set", found)
        return
    raise UserError(
        f"{found}. Are these statistics of another robot, in other units, or in another order of dimensions? "
        f"`pi0 data stats` computes those of the demonstrations; --data.trust-norm-stats trains with these."
    )


def _codec(
    config: TrainConfig,
    datasets: Sequence[OpenDataset],
    groups: Mapping[str, Normalization],
    weights: Assets | None,
    *,
    keep: bool,
) -> FastCodec | None:
    """The codec of action tokens, as of `_tokenizer`; None where the objective writes none."""
    if config.policy.objective.codec is None:
        return None
    if config.augment.square_symmetries:
        raise UserError("augment.square_symmetries turns actions after they are tokens: turn it off.")
    if weights is not None and weights.codec is not None and (keep or config.data.codec is None):
        codec = FastCodec.from_files(weights.codec, "the checkpoint's action codec")
    elif config.data.codec is not None:
        codec = FastCodec.load(config.data.codec)
    else:
        codec = fit_codec(datasets, groups, config.policy, config.data.codes)
        _log.info("action tokens: a FAST codec of %d codes is fitted to the demonstrations", codec.num_codes)
        if weights is not None:
            _log.warning(
                "the weights come without a codec: if they have written action tokens before, name theirs, "
                "--data.codec, since the same ids mean other actions now"
            )
    for robot in (each.robot for each in datasets):
        check_shape(codec, config.policy.model.action_horizon, len(robot.model_actions), robot.name)
    return codec


def _texts(datasets: Sequence[OpenDataset]) -> list[str]:
    """Instructions of datasets, and what is to be written after them."""
    tasks = [task for each in datasets for task in each.source.tasks]
    return [*tasks, *(text for task in tasks if (text := text_of(task)))]


def _tokenizer(
    config: TrainConfig,
    datasets: Sequence[OpenDataset],
    weights: Assets | None,
    codec: FastCodec | None,
    *,
    keep: bool,
) -> Tokenizer:
    """The tokenizer of the weights (`keep`: even if the configuration names another), of the configuration, or one
    trained on the instructions, which leaves room for the codes of the codec."""
    if weights is not None and weights.tokenizer is not None and (keep or config.data.tokenizer is None):
        return Tokenizer(weights.tokenizer, source="the checkpoint's tokenizer")
    if config.data.tokenizer is not None:
        return Tokenizer.from_file(config.data.tokenizer)
    fast, reserved = config.policy.objective.codec, 0
    if fast is not None and codec is not None and not fast.own_table:
        reserved = fast.skip + codec.num_codes
        if config.policy.model.vocab_size - reserved < FEWEST_TOKENS:
            raise UserError(
                f"model.vocab_size is {config.policy.model.vocab_size}, and action tokens take {reserved} of it: raise "
                f"it to {reserved + FEWEST_TOKENS} or more, or take a codec of fewer codes: "
                "--data.codes 300."
            )
    return Tokenizer.train(_texts(datasets), config.policy.model.vocab_size - reserved)
