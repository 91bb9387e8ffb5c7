"""Datasets as a configuration names them, opened under their robots' names, and the order in which they are sampled.

The order is one endless stream: sample number s of a run is a frame of a dataset, whoever asks for it. It depends on
the seed, the datasets, their weights and nothing else, so that any number of processes can share it and a run can go
on anywhere in it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from pi0_jax.config import DataConfig, DatasetConfig, PolicyConfig
from pi0_jax.data.cache import CachedFrames
from pi0_jax.data.files import find_dataset
from pi0_jax.data.foreign import explain
from pi0_jax.data.frames import keep_frames
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.names import in_robots_order, is_depth, log_recognised, recognise
from pi0_jax.data.pairs import IMAGE, PairsDataset, is_pairs
from pi0_jax.data.ranges import sampled_frames
from pi0_jax.data.rates import Resampled, log_rate, same_rate
from pi0_jax.data.rlds.reader import RldsDataset, feature_names
from pi0_jax.data.robots import ROBOTS, Robot, get_robot, semantics_of
from pi0_jax.data.source import ACTION, STATE, SUCCESS, Renamed, Source
from pi0_jax.errors import UserError, did_you_mean, listed

BLOCK = 2**16
"""Samples after which the datasets have had exactly their shares. Shares are multiples of one in so many."""

RLDS_FILES = ("features.json", "*/features.json")

_log = logging.getLogger(__name__)

Order = Callable[[int], Int[np.ndarray, "n"]]
"""From the number of an epoch to the frames in the order in which it visits them."""
Weights = Sequence[int | float] | np.ndarray


class OpenDataset(NamedTuple):
    """One dataset of a mixture."""

    source: Source
    robot: Robot
    cameras: dict[str, str]
    """The robot's cameras that the model reads: feature of the source → camera of the model."""
    semantics: tuple[str, ...]
    """Meaning of each action dimension, one of `data.robots.SEMANTICS`."""
    weight: int | float | None
    stats: str
    """Name of the statistics that normalise it."""
    training: Int[np.ndarray, "e"]
    """Episodes to train on."""
    held_out: Int[np.ndarray, "v"]
    """Episodes for the validation loss."""
    sampled: Int[np.ndarray, "n"] | None = None
    """Frames that training may sample, in order; None: all."""


def open_datasets(
    data: DataConfig, policy: PolicyConfig, *, log_skipped: bool = True, pictures: bool = False
) -> list[OpenDataset]:
    """Opens the datasets of an experiment, and logs the episodes that were left out.

    Files of states and actions have to be there, and with `pictures` those of the robot's cameras.

    Raises:
        FileNotFoundError, UserError: files are missing; no dataset is named, one cannot be read, or is not its robot's;
            some have weights and others have not, or a weight is not positive; their rates differ; a share of episodes
            is out of range; successful episodes are asked for, and no dataset says which those are, or one has none.
    """
    if not 0 <= data.validation_share < 1:
        raise UserError(f"`data.validation_share` is {data.validation_share}; expected a share, 0 or more and below 1.")
    datasets = dataset_configs(data)
    weights = [dataset.weight for dataset in datasets]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise UserError(f"the datasets have weights {weights}; give one to all of them or to none.")
    if bad := [weight for weight in weights if weight is not None and not weight > 0]:
        raise UserError(f"datasets have weights {bad}; a weight is above 0. Leave out what should not be sampled.")
    found = [open_dataset(dataset, data, policy, pictures=pictures) for dataset in datasets]
    for dataset in found if log_skipped else ():
        dataset.source.report_skipped()
    _check_rates(found, data.mixed_rates, get_robot(policy.robot))
    if data.success_only and not any(SUCCESS in each.source.features for each in found):
        raise UserError(
            f"`data.success_only` is set, and {listed([str(each.source.root) for each in found])} has no column "
            f"{SUCCESS!r} that says which episodes succeeded. `pi0 evaluate --record` writes one; name another with "
            f"`keys`, DatasetConfig(path, keys={{{SUCCESS!r}: 'NAME'}}), or take success_only away."
        )
    return found


def _check_rates(datasets: Sequence[OpenDataset], mixed: bool, robot: Robot) -> None:
    """Refuses datasets of different rates, unless they are to be mixed."""
    roots = {float(each.source.fps): each.source.root for each in datasets if each.source.has_actions}
    if not roots:
        raise UserError("all datasets are image-text pairs; at least one needs demonstrations with actions.")
    if mixed or same_rate(max(roots), min(roots)):
        return
    rates = ", ".join(f"{fps:g} frames per second in {root}" for fps, root in roots.items())
    raise UserError(
        f"the datasets have different rates: {rates}. As many actions take longer in one than in the other, and a "
        f"robot acts at one rate. Bring them to one, --data.resample-fps {robot.fps or min(roots):g} (resample_fps "
        "in the DataConfig), or mix them as they are, --data.mixed-rates."
    )


def dataset_configs(data: DataConfig) -> tuple[DatasetConfig, ...]:
    """The datasets that a configuration names.

    Raises:
        UserError: none.
    """
    if data.datasets:
        return data.datasets
    if not data.path:
        raise UserError(
            "the configuration names no demonstrations. Set `data.path` to the folder of a LeRobot or RLDS dataset, "
            'such as data=DataConfig(path="data/mine"), or list several in `data.datasets` (docs/data.md).'
        )
    return (DatasetConfig(data.path),)


def open_dataset(
    dataset: DatasetConfig, data: DataConfig, policy: PolicyConfig, *, pictures: bool = False
) -> OpenDataset:
    """Opens one dataset; errors as of `open_datasets`."""
    robot = get_robot(dataset.robot or policy.robot)
    if is_pairs(root := find_dataset(dataset.path, data.offline)):
        return _open_pairs(root, robot, dataset, policy)
    source, cameras = open_source(dataset, data, robot), robot.select_cameras(policy.model.cameras)
    size = policy.model.vision.image_size
    if data.cache is not None:
        source = CachedFrames(source, Path(data.cache), list(cameras), size)
    elif data.frames == "auto":
        source = keep_frames(source, list(cameras), size, data.kept_gb)
    source.check_files(list(cameras) if pictures else [])
    episodes = np.arange(source.num_episodes)
    keys = source.episode_keys() if data.validation_share > 0 else [0] * source.num_episodes
    held_out = np.array([key < data.validation_share * 2**64 for key in keys])
    worded = np.ones(len(episodes), bool) if dataset.prompt is not None else _worded(source)
    if not worded.any():
        raise UserError(
            f"no episode of {source.root} has an instruction: give them one, "
            f"datasets=(DatasetConfig({str(dataset.path)!r}, prompt='fold the towel'),), or prompt='' to train without."
        )
    usable = worded & _succeeded(source) if data.success_only and SUCCESS in source.features else worded
    semantics, stats = semantics_of(robot, policy.action_semantics), dataset.stats or robot.name
    training, held_out = episodes[usable & ~held_out], episodes[usable & held_out]
    sampled = None if dataset.sample_ranges is None else sampled_frames(source, dataset.sample_ranges)
    if data.resample_fps is not None and not same_rate(source.fps, data.resample_fps):
        source = Resampled(source, data.resample_fps, robot, semantics)
        log_rate(source, robot)
        sampled = None if sampled is None else source.keeps(sampled)
        if robot.name != get_robot(policy.robot).name:  # another robot's demonstrations, at the rate of the policy's
            robot = dataclasses.replace(robot, fps=data.resample_fps)
    return OpenDataset(source, robot, cameras, semantics, dataset.weight, stats, training, held_out, sampled)


def _open_pairs(root: Path, robot: Robot, dataset: DatasetConfig, policy: PolicyConfig) -> OpenDataset:
    """Image-text pairs, all of them to train on; their pictures are the model's first camera."""
    if not policy.model.cameras:
        raise UserError(f"{root} has image-text pairs, and the model has no camera.")
    camera, size = policy.model.cameras[0], policy.model.vision.image_size
    source, semantics = PairsDataset(root, robot, size), semantics_of(robot, policy.action_semantics)
    every, none = np.arange(source.num_episodes), np.arange(0)
    stats = dataset.stats or robot.name
    return OpenDataset(source, robot, {IMAGE: camera}, semantics, dataset.weight, stats, every, none)


def open_source(dataset: DatasetConfig, data: DataConfig, robot: Robot) -> Source:
    """The episodes of a dataset, under the names of its robot.

    Raises:
        FileNotFoundError, UserError: see `LeRobotDataset` and `RldsDataset`; or neither is in the folder.
    """
    preset = None if dataset.preset is None else get_robot(dataset.preset).rlds
    if dataset.preset is not None and preset is None:
        known = [name for name in ROBOTS if get_robot(name).rlds is not None]
        raise UserError(f"there is no published RLDS dataset of {dataset.preset!r}; there are those of {known}.")
    root = find_dataset(dataset.path, data.offline)
    if root.exists() and not any(any(root.glob(name)) for name in ("meta/info.json", *RLDS_FILES)):
        raise FileNotFoundError(explain(root))
    if preset is not None or any(any(root.glob(name)) for name in RLDS_FILES):
        published = None if dataset.keys else robot.rlds
        if preset is None and published is not None and published.features <= set(feature_names(root)):
            preset = published
            _log.info("%s: read as the published dataset of %s", root, robot.name)
        if dataset.without_episodes:
            raise UserError(f"{root} is an RLDS dataset, whose episodes have no numbers for `without_episodes`.")
        if dataset.prompt_from != "task":
            raise UserError(
                f"{root} is an RLDS dataset, and `prompt_from` is for LeRobot's subtasks: name the feature with the "
                f"words of a step in the dataset's `task`; it has {feature_names(root)}."
            )
        fps = dataset.fps or (preset.fps if preset else robot.fps)
        if fps is None:
            raise UserError(
                f"{root} is an RLDS dataset, which does not store its rate, and {robot.name} has no fixed one: set "
                "`fps` in the robot's file, or of the DatasetConfig."
            )
        source: Source = RldsDataset(
            root,
            fps,
            split=dataset.split,
            task=dataset.task or (preset.task if preset else None),
            only=preset.only if preset else None,
            skip_bad_episodes=data.skip_bad_episodes,
        )
    else:
        source = LeRobotDataset(
            root,
            skip_bad_episodes=data.skip_bad_episodes,
            without=dataset.without_episodes,
            prompt_from=dataset.prompt_from,
        )
    if dataset.prompt is not None:
        source.tasks = [task if task.strip() else dataset.prompt for task in source.tasks]
    named = {**(preset.keys if preset else {}), **dataset.keys}
    found = {ours: theirs for ours, theirs in recognise(source.features, robot).items() if ours not in named}
    log_recognised(root, found)
    if named or found:
        source = Renamed(source, found | named)
    if missing := [name for name in (STATE, ACTION) if name not in source.features]:
        columns = [name for name in source.features if name not in source.cameras]
        raise UserError(
            f"{root} has no {' and no '.join(missing)}; it has {list(source.features)}. Name them in the dataset's "
            f"`keys`, such as keys={{{missing[0]!r}: 'NAME'}}; `pi0 data robot` takes --state and --actions."
            f"{did_you_mean(missing[0], columns)}"
        )
    for name in robot.cameras:
        if name not in named and is_depth(source.features.get(name, {})):
            raise UserError(
                f"{name} of {root} is a depth stream, and no picture: leave it out of the cameras of {robot.name}. To "
                f"see it in shades of grey, of which its 8 highest bits are left, set keys={{{name!r}: {name!r}}}."
            )
    return in_robots_order(source, robot)


def _worded(source: Source) -> Bool[np.ndarray, "e"]:
    """Whether an episode has an instruction in any of its frames; the log names those that have none."""
    empty = [i for i, task in enumerate(source.tasks) if not task.strip()]
    if not empty:
        return np.ones(source.num_episodes, bool)
    with_words = source.episode_of(np.flatnonzero(~np.isin(source.task_index, empty)))
    worded = np.isin(np.arange(source.num_episodes), with_words)
    if names := [source.episodes[e] for e in np.flatnonzero(~worded).tolist()]:
        _log.warning(
            "%s: %d of %d episodes have no instruction: %s; training leaves them out, unless the dataset has a "
            "`prompt`",
            source.root,
            len(names),
            source.num_episodes,
            listed(names),
        )
    return worded


def _succeeded(source: Source) -> Bool[np.ndarray, "e"]:
    """Whether an episode succeeded in any of its frames; the log says how many did."""
    frames = np.flatnonzero(source.columns(SUCCESS)[:, 0])
    succeeded = np.isin(np.arange(source.num_episodes), source.episode_of(frames))
    if not succeeded.any():
        raise UserError(f"{source.root}: column {SUCCESS!r} is 0 throughout, so no episode is left by success_only.")
    _log.info("%s: kept %d of %d episodes, those that succeeded", source.root, succeeded.sum(), len(succeeded))
    return succeeded


class Stream:
    """The endless order of samples.

    In every `BLOCK` samples each dataset has exactly its share, at places drawn for that block, and every dataset goes
    through its own frames in its own order, epoch after epoch. `orders` give the frames of an epoch of each dataset,
    `sizes` how many those are. `weights` are shares of any sum; None: by `sizes`.
    """

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int], weights: Weights | None, seed: int):
        self._orders, self._sizes, self._seed = list(orders), np.array(sizes), seed
        self.quota = apportion(self._sizes if weights is None else weights, BLOCK)
        """Samples of each dataset in a block."""
        self._block = functools.lru_cache(maxsize=2)(self._make_block)
        self._epoch = functools.lru_cache(maxsize=2 * len(self._orders))(lambda member, n: self._orders[member](n))

    def __reduce__(self):
        return Stream, (self._orders, self._sizes.tolist(), self.quota, self._seed)

    def __call__(self, samples: Int[np.ndarray, "b"]) -> tuple[Int[np.ndarray, "b"], Int[np.ndarray, "b"]]:
        """The dataset and the frame of each sample, by the samples' numbers."""
        members, frames = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        for i, sample in enumerate(samples.tolist()):
            number, place = divmod(sample, BLOCK)
            member, rank = (int(x[place]) for x in self._block(number))
            epoch, position = divmod(number * int(self.quota[member]) + rank, int(self._sizes[member]))
            members[i], frames[i] = member, self._epoch(member, epoch)[position]
        return members, frames

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The dataset at each place of a block, and how many of that dataset came before it there."""
        members = np.repeat(np.arange(len(self.quota), dtype=np.int32), self.quota)
        if len(self.quota) > 1:
            members = members[np.random.default_rng((self._seed, number, 1 << 20)).permutation(BLOCK)]
        ranks = np.empty(BLOCK, np.int32)
        for member, count in enumerate(self.quota):
            ranks[members == member] = np.arange(count)
        return members, ranks


class FrameOrder:
    """The order in which epochs visit the frames of one dataset.

    `number` is that of the dataset in its mixture. `shards` has for each file the frame after its last: files are
    visited in random order, and the frames of `window` files at a time in random order; None: all frames in random
    order.
    """

    def __init__(self, frames: np.ndarray, seed: int, number: int, shards: np.ndarray | None, window: int):
        self._frames, self._seed, self._number, self._shards, self._window = frames, seed, number, shards, window

    def __call__(self, epoch: int) -> Int[np.ndarray, "n"]:
        rng = np.random.default_rng((self._seed, epoch, self._number))  # number 0 changes nothing, by definition
        if self._shards is None:
            return self._frames[rng.permutation(len(self._frames))]
        shard = np.searchsorted(self._shards, self._frames, side="right")
        order = rng.permutation(len(self._shards))
        groups = [
            np.flatnonzero(np.isin(shard, order[i : i + self._window])) for i in range(0, len(order), self._window)
        ]
        return self._frames[np.concatenate([group[rng.permutation(len(group))] for group in groups])]


def apportion(weights: Weights, total: int) -> Int[np.ndarray, "n"]:
    """Whole numbers in proportion to `weights` that sum to `total`, each at least 1 (largest remainders)."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.maximum(1, np.floor(shares)).astype(np.int64)
    order = np.argsort(-(shares - np.floor(shares)), kind="stable")
    missing = total - int(counts.sum())
    if missing < 0:  # ones given to the smallest are taken from the largest
        counts[np.argmax(counts)] += missing
        return counts
    counts[order[:missing]] += 1
    return counts
