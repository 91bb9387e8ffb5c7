"""`pi0 data SUBCOMMAND`: the dataclasses are the command lines, the functions run them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from pi0_jax.config import Fast as FastTokens
from pi0_jax.config import TrainConfig
from pi0_jax.data.cache import build_cache
from pi0_jax.data.fast import FastCodec
from pi0_jax.data.hdf5.layout import Hdf5Options
from pi0_jax.data.hdf5.reader import Hdf5Dataset
from pi0_jax.data.lerobot.merge import convert
from pi0_jax.data.mixture import OpenDataset, dataset_configs, open_datasets, open_source
from pi0_jax.data.normalization import (
    Normalization,
    normalization_from_json,
    read_stats_file,
    save_json,
    stats_from_json,
    stats_to_json,
)
from pi0_jax.data.robots import ROBOTS, get_robot
from pi0_jax.data.source import ACTION, STATE, Source
from pi0_jax.data.tools.check import check_dataset
from pi0_jax.data.tools.fit_codec import fit_codec, normalized_chunks, report_lines
from pi0_jax.data.tools.given import SHOWN, fit_given
from pi0_jax.data.tools.robot import describe_robot
from pi0_jax.data.tools.show import show
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.data.transform import check_fits
from pi0_jax.errors import UserError, listed

FRAME = 5
"""Action tokens that are no codes: a marker of three, `|` and EOS."""

Config = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]


@dataclasses.dataclass(frozen=True)
class Stats:
    """Computes the statistics that normalise states and actions, from columns alone: no picture is read.

    Those of the episodes to train on, where the config holds some out. When stopped, run it again: it goes on.
    Example: pi0 data stats configs/mine.py --output norm_stats.json
    """

    config: Config
    """Python file that sets `config`; its fields can be set behind it, as in --data.path data/mine."""
    output: Path = Path("norm_stats.json")
    """File to write; name it in the config's `data.norm_stats`. openpi reads it too."""
    workers: int | None = None
    """Processes; one a core by default."""
    ray: bool = False
    """Stream the work through a Ray cluster (pip install -e '.[ray]'), that of RAY_ADDRESS or one on this machine."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be read, and say which."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Looks for what spoils training, and fails with its name.

    Episodes that cannot be read, values that are not finite, relative actions that are changes already, given
    statistics that are far off, quantiles that leave too much outside, grippers of other units than the robot's, wrong
    timestamps, missing frames, tasks without text. Dimensions that hardly vary and ranges of grippers are listed.
    Example:
        pi0 data check configs/mine.py
    """

    config: Config
    """Python file that sets `config`; its fields can be set behind it, as in --data.path data/mine."""
    outside: float = 0.05
    """Largest share of frames beyond 1.5 times the 1 % to 99 % range of a dimension."""
    decode: bool = False
    """Decode every frame as well, which takes as long as it takes."""
    ray: bool = False
    """Stream statistics and decoding through a Ray cluster, as `pi0 data stats --ray` does."""


@dataclasses.dataclass(frozen=True)
class Show:
    """Makes one HTML file of a dataset: pictures, histograms of states and actions, and curves of some episodes.

    Example: pi0 data show configs/mine.py --output data.html
    """

    config: Config
    """Python file that sets `config`; its fields can be set behind it, as in --data.path data/mine."""
    output: Path = Path("data.html")
    """File to write."""
    episodes: int = 4
    """Episodes to draw."""
    rerun: Path | None = None
    """Also log them to this Rerun recording, .rrd (pip install -e '.[viz]')."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be read, and say which."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """Decodes all frames once, resizes them to the model's resolution and keeps them in shards with checksums.

    A frame takes 3 · size² bytes (150 kB at 224 px), or some tenth of that with --jpeg 95. A build that was stopped
    goes on where it was. Example: pi0 data cache configs/mine.py --output cache
    """

    config: Config
    """Python file that sets `config`; its fields can be set behind it, as in --data.path data/mine."""
    output: Path = Path("cache")
    """Folder to write; name it in the config's `data.cache`."""
    jpeg: int | None = None
    """Quality of JPEG, 1 to 100; by default pixels are kept as they are."""
    workers: int | None = None
    """Processes; one a core by default."""
    ray: bool = False
    """Stream the work through a Ray cluster (pip install -e '.[ray]'), that of RAY_ADDRESS or one on this machine."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be read, and say which."""


@dataclasses.dataclass(frozen=True)
class Fast:
    """Fits a FAST codec, which writes action chunks as tokens, to the demonstrations of a config.

    Chunks are made relative and normalised as in training, and compressed: cosine transform along time, rounding,
    byte-pair encoding. Prints codes per chunk, which have to fit into the objective's `max_tokens`, and the error of
    each dimension: a larger scale errs less and takes more codes, a larger vocabulary makes fewer. Needs the extra
    `fast` (pip install -e '.[fast]'). Examples:
        pi0 data fast configs/mine.py --output codecs/mine --vocab 1024 --scale 10
        pi0 data fast configs/mine.py --codec codecs/fast       # what the published one does to these demonstrations
    """

    config: Config
    """Python file that sets `config`; its fields can be set behind it, as in --data.path data/mine."""
    output: Path = Path("fast")
    """Folder to create, in the format of physical-intelligence/fast; name it in the config's `data.codec`."""
    vocab: int = 1024
    """Codes, at most; the published codecs have 1024 and 2048. Each of the 256 bytes takes one."""
    scale: float = 10.0
    """Coefficients are rounded to multiples of one over this, in normalised units."""
    chunks: int = 20_000
    """Action chunks, taken at random, that it is fitted to; up to 4,000 others are the measure."""
    codec: Path | None = None
    """Measure this codec on the demonstrations, and fit none."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be read, and say which."""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turns RLDS, LeRobot 2.x or HDF5 into LeRobot 3.0, a few episodes at a time: when stopped, run it again.

    Takes the dataset of a config, under the robot's names; or HDF5 files of robomimic, LIBERO or ALOHA. Examples:
        pi0 data convert configs/mine.py data/mine-v3
        pi0 data convert data/episodes data/mine-v3 --prompt "fold the towel"
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG|HDF5")]
    """Python file that sets `config`, one of whose datasets is converted; or an HDF5 file or a folder of them."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder to create."""
    dataset: int = 0
    """Number of the dataset in the config's mixture."""
    crf: int = 18
    """Quality of the video, 0 (best) to 51."""
    workers: int | None = None
    """Processes, each of which holds the pictures of one episode; one a core by default."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be read, and say which."""
    hdf5: Annotated[Hdf5Options, tyro.conf.arg(name="")] = Hdf5Options()

    @property
    def config(self) -> Path | None:
        """The Python file, if it is one."""
        return self.source if self.source.suffix == ".py" else None


@dataclasses.dataclass(frozen=True)
class Robot:
    """Writes the file of a robot that fits a LeRobot or RLDS dataset, to be looked through and completed.

    Cameras, names and what actions mean are proposed, and why. Examples:
        pi0 data robot data/mine --output my_robot.py
        pi0 data robot hf://owner/name
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """Folder of the dataset, or hf://owner/name."""
    output: Path = Path("my_robot.py")
    """File to create."""
    state: str | None = None
    """Feature that is the state, where it is not recognised; " + " joins several, as in "observation/xyz + gripper"."""
    actions: str | None = None
    """The same of the actions."""
    offline: bool = False
    """Do not ask the network, as HF_HUB_OFFLINE=1 does: a dataset of the hub has to be in its cache. (--data.offline is
    that of pi0 train.)"""


def stats(args: Stats, config: TrainConfig) -> None:
    """Runs `pi0 data stats`.

    Raises:
        FileNotFoundError, UserError, OSError: something that the user chose cannot be used; the message says why.
    """
    datasets = _open(config, args.skip_bad_episodes, config.data.validation_share)
    workers, horizon = args.workers or os.cpu_count() or 1, config.policy.model.action_horizon
    kept = args.output.with_name(f".{args.output.name}.part")
    groups = compute_normalizations(datasets, horizon, workers=workers, ray=args.ray, kept=kept)
    semantics = {dataset.robot.name: dataset.semantics for dataset in datasets}
    own = groups.get(get_robot(config.policy.robot).name, next(iter(groups.values())))
    save_json(stats_to_json(own.stats, groups, semantics), args.output)
    for name, group in groups.items():
        robot = next(dataset.robot for dataset in datasets if dataset.stats == name)
        for key, names in (("state", robot.model_state), ("actions", robot.model_actions)):
            print(f"\n{name} {key:18} {'mean':>10} {'std':>10} {'1 %':>10} {'99 %':>10} {'min':>10} {'max':>10}")
            entry = group.stats[key]
            for i, dim in enumerate(names):
                columns = (entry.mean, entry.std, entry.q01, entry.q99, entry.min, entry.max)
                print(f"  {dim:28}" + "".join(f" {c[i]:10.4g}" for c in columns if c is not None))
    print(f"\nwrote {args.output}; set data.norm_stats to it")


def check(args: Check, config: TrainConfig) -> None:
    """Runs `pi0 data check`; raises UserError with all that was found."""
    datasets = _open(config, True, config.data.validation_share, log_skipped=False)
    groups = compute_normalizations(
        datasets, config.policy.model.action_horizon, workers=os.cpu_count() or 1, ray=args.ray
    )
    given = None if config.data.norm_stats is None else read_stats_file(config.data.norm_stats)
    found = []
    for dataset in datasets:
        stats = groups[dataset.stats].stats
        problems, notes = check_dataset(dataset, stats, outside=args.outside, decode=args.decode, ray=args.ray)
        problems += [] if given is None else _check_given(dataset, given, config)
        problems += _check_fits(dataset, config)
        found += [f"{dataset.source.root}: {problem}" for problem in problems]
        for note in notes:
            print(f"note: {dataset.source.root}: {note}")
    if found:
        raise UserError(f"{len(found)} problem{'s' * (len(found) > 1)}:\n  " + "\n  ".join(found))
    episodes, frames = (sum(getattr(each.source, name) for each in datasets) for name in ("num_episodes", "num_frames"))
    print(f"no problem in {len(datasets)} dataset{'s' * (len(datasets) > 1)}, {episodes} episodes, {frames} frames")


def _check_given(dataset: OpenDataset, given: dict[str, Any], config: TrainConfig) -> list[str]:
    """Dimensions of the demonstrations to train on that the statistics of a file do not fit."""
    policy = config.policy
    try:
        stats = stats_from_json(given, dataset.stats)
        fit = fit_given(dataset, stats, policy.normalization, policy.model.action_horizon, dataset.training)
    except UserError as error:
        return [f"{config.data.norm_stats}: {error}"]
    return [f"{config.data.norm_stats} is far off: {listed(fit.far_off, SHOWN)}"] if fit.far_off else []


def _check_fits(dataset: OpenDataset, config: TrainConfig) -> list[str]:
    """What keeps the robot from the model; one with random weights becomes as wide as it has to be."""
    model = config.policy.model
    if config.init_from is None:
        width = max(len(names) for names in (dataset.robot.model_state, dataset.robot.model_actions))
        model = dataclasses.replace(model, action_dim=max(width, model.action_dim))
    try:
        check_fits(dataset.robot, model)
    except UserError as error:
        return [str(error)]
    return []


def show_(args: Show, config: TrainConfig) -> None:
    """Runs `pi0 data show`; errors as of `stats`."""
    show(_open(config, args.skip_bad_episodes), args.output, args.episodes, args.rerun)
    print(f"wrote {args.output}")


def cache(args: Cache, config: TrainConfig) -> None:
    """Runs `pi0 data cache`; errors as of `stats`."""
    size = config.policy.model.vision.image_size
    total = frames = 0
    as_recorded = dataclasses.replace(config.data, resample_fps=None, mixed_rates=True)
    for dataset in _open(dataclasses.replace(config, data=as_recorded), args.skip_bad_episodes):
        total += build_cache(
            dataset.source, args.output, list(dataset.cameras), size, args.jpeg, args.workers, ray=args.ray
        )
        frames += dataset.source.num_frames * len(dataset.cameras)
    print(f"{frames} frames of {size} px, {total / 1e6:.1f} MB, {total / frames:.0f} bytes per frame: {args.output}")
    print("set data.cache to it")


def fast(args: Fast, config: TrainConfig) -> None:
    """Runs `pi0 data fast`; errors as of `stats`, and of `FastCodec`."""
    if args.codec is None and args.output.exists():
        raise FileExistsError(f"{args.output} exists. Choose another folder, or remove it.")
    given = None if args.codec is None else FastCodec.load(args.codec)
    policy, datasets = config.policy, _open(config, args.skip_bad_episodes, config.data.validation_share)
    groups = _normalizations(config, datasets)
    codec = given or fit_codec(datasets, groups, policy, args.vocab, args.scale, args.chunks)
    room = (policy.objective.codec or FastTokens()).max_tokens - FRAME
    measured = normalized_chunks(datasets, groups, policy, min(args.chunks, 4000), seed=1, progress=False)
    for dataset, chunks in zip(datasets, measured, strict=True):
        normalization = groups[dataset.stats]
        print("\n" + "\n".join(report_lines(codec, chunks, dataset, normalization, policy.normalization, room)))
    if given is None:
        codec.save(args.output)
        print(f"\nwrote {args.output}, {codec.num_codes} codes; set data.codec to it")


def _normalizations(config: TrainConfig, datasets: list[OpenDataset]) -> dict[str, Normalization]:
    """Statistics by name, as a training that begins has them."""
    if config.data.norm_stats is None:
        return compute_normalizations(datasets, config.policy.model.action_horizon, sampled=True)
    given = read_stats_file(config.data.norm_stats)
    semantics = {dataset.robot.name: dataset.semantics for dataset in datasets}
    return {each.stats: normalization_from_json(given, each.robot, semantics, each.stats) for each in datasets}


def convert_(args: Convert, config: TrainConfig | None) -> None:
    """Runs `pi0 data convert`; errors as of `stats`."""
    if args.output.exists():
        raise FileExistsError(f"{args.output} exists. Choose another folder, or remove it.")
    if config is None:
        hdf5 = Hdf5Dataset(args.source, args.hdf5, skip_bad_episodes=args.skip_bad_episodes)
        hdf5.report_skipped()
        source, robot_type = hdf5, hdf5.robot_type
    else:
        source, robot_type = _of_config(args, config)
    convert(source, args.output, robot_type, crf=args.crf, workers=args.workers, settings=repr(args.hdf5))
    print(f"{source.num_episodes} episodes, {source.num_frames} frames, {source.fps} per second: {args.output}")
    if config is None:
        print(f"describe the robot: pi0 data robot {args.output}")
    if config is None and robot_type in ROBOTS:
        print(f'or, if its cameras and units are those of the built-in one: policy.robot="{robot_type}"')


def _of_config(args: Convert, config: TrainConfig) -> tuple[Source, str]:
    """The dataset of a configuration that is to be converted, and the name of its robot."""
    if args.hdf5 != Hdf5Options():
        raise UserError(f"{args.source} is a config; --fps, --prompt and the like are for HDF5 files.")
    data = dataclasses.replace(config.data, frames="random", cache=None, skip_bad_episodes=args.skip_bad_episodes)
    datasets = dataset_configs(data)
    if not 0 <= args.dataset < len(datasets):
        raise UserError(f"--dataset is {args.dataset}; the config has {len(datasets)}, counted from 0.")
    dataset = datasets[args.dataset]
    robot = get_robot(dataset.robot or config.policy.robot)
    return open_source(dataset, data, robot), robot.name


def robot_(args: Robot, _: None) -> None:
    """Runs `pi0 data robot`; errors as of `stats`."""
    if args.output.exists():
        raise FileExistsError(f"{args.output} exists. Choose another file with --output.")
    if args.output.suffix != ".py":
        raise UserError(f"--output is {args.output}; expected a Python file, such as {args.output}.py.")
    keys = {name: value for name, value in ((STATE, args.state), (ACTION, args.actions)) if value is not None}
    text = describe_robot(args.path, args.output.stem, args.offline, keys)
    args.output.write_text(text)
    print(text)
    print(f"wrote {args.output}; look through it, and set policy.robot to its path. With a recipe of configs/:")
    if keys:
        print(f"data=DataConfig(datasets=(DatasetConfig({args.path!r}, keys={keys}),)) in the config, and")
    fields = ("" if keys else f"--data.path {args.path} ") + f"--policy.robot {args.output}"
    print(f"pi0 data check CONFIG {fields}\npi0 train CONFIG {fields}")


def _open(
    config: TrainConfig, skip_bad: bool, validation_share: float = 0.0, *, log_skipped: bool = True
) -> list[OpenDataset]:
    skip_bad = skip_bad or config.data.skip_bad_episodes
    changes = {"cache": None, "frames": "random", "skip_bad_episodes": skip_bad, "validation_share": validation_share}
    found = open_datasets(dataclasses.replace(config.data, **changes), config.policy, log_skipped=log_skipped)
    for pairs in (each.source for each in found if not each.source.has_actions):
        print(f"{pairs.root}: {pairs.num_episodes} image-text pairs, which have no actions to look at")
    return [each for each in found if each.source.has_actions]


SUBCOMMANDS: dict[str, tuple[type, Callable]] = {
    "stats": (Stats, stats),
    "check": (Check, check),
    "show": (Show, show_),
    "cache": (Cache, cache),
    "fast": (Fast, fast),
    "convert": (Convert, convert_),
    "robot": (Robot, robot_),
}
"""Name of a subcommand to its command line, and the function that runs it with its configuration (None: without)."""
