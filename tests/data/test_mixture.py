"""Mixtures: shares, one order for everybody, own statistics, held-out episodes without leaks, workers and resuming."""

import concurrent.futures
import dataclasses
import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.cache import CachedFrames, build_cache
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.loader import BatchReader, eval_batches, make_loader
from pi0_jax.data.mixture import BLOCK, FrameOrder, Stream, apportion, open_datasets
from pi0_jax.data.rlds.reader import RldsDataset
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.data.transform import make_transform
from pi0_jax.errors import UserError
from tests.data.conftest import LENGTHS, write
from tests.data.formats import RLDS_KEYS, write_rlds, write_v2
from tests.data.stats import compute_stats
from tests.data.test_check import record


def stream(sizes, weights, seed=0):
    orders = [FrameOrder(np.arange(size), seed, number, None, 1) for number, size in enumerate(sizes)]
    return Stream(orders, sizes, weights, seed)


def test_sampled_shares_are_within_binomial_bounds_of_the_weights():
    weights = np.array([0.7, 0.25, 0.05])
    members, _ = stream([1000, 50, 3], weights)(np.arange(20_000))
    counts = np.bincount(members, minlength=3)
    assert (np.abs(counts - 20_000 * weights) < 4 * np.sqrt(20_000 * weights * (1 - weights))).all()


def test_without_weights_each_frame_counts_the_same():
    np.testing.assert_array_equal(stream([3000, 1000], None).quota, [BLOCK * 3 // 4, BLOCK // 4])


def test_each_dataset_is_visited_epoch_by_epoch_across_blocks():
    sample = stream([700, 900], [0.4, 0.6])
    start = BLOCK - 3000
    members, frames = sample(np.arange(start, start + 6000))
    for member, size in enumerate([700, 900]):
        own = frames[members == member]
        position = start // BLOCK  # whole epochs can be cut out wherever they begin
        before = int((sample(np.arange(position, start))[0] == member).sum())
        own = own[-before % size :]
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert len(epochs) >= 2
        np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(size), (len(epochs), 1)))
        assert (epochs[0] != epochs[1]).any()


def test_the_order_is_the_same_however_it_is_asked_for():
    whole = np.stack(stream([70, 30], [0.5, 0.5])(np.arange(960)))
    parts = np.concatenate([np.stack(stream([70, 30], [0.5, 0.5])(np.arange(i, i + 96))) for i in range(0, 960, 96)], 1)
    np.testing.assert_array_equal(whole, parts)
    other = np.stack(stream([70, 30], [0.5, 0.5], seed=1)(np.arange(960)))
    assert (whole != other).any()


def test_shares_are_whole_numbers_that_leave_nobody_out():
    for weights in ([1, 1, 1], [1e-9, 1, 1], [5]):
        counts = apportion(weights, 1000)
        assert counts.sum() == 1000
        assert counts.min() >= 1
    np.testing.assert_array_equal(apportion([2, 1, 1], 8), [4, 2, 2])


def test_by_shards_frames_mix_within_a_few_files_only():
    order = FrameOrder(np.arange(100), 0, 0, np.arange(10, 101, 10), window=2)
    for epoch in (0, 1):
        frames = order(epoch)
        np.testing.assert_array_equal(np.sort(frames), np.arange(100))
        groups = (frames // 10).reshape(5, 20)
        assert all(len(np.unique(group)) == 2 for group in groups)
        assert (np.diff(frames) < 0).any()
    assert (order(0) != order(1)).any()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    pytest.importorskip("tensorflow_datasets")
    return str(write(root / "lerobot")), str(write_rlds(root / "rlds"))


def mixed(config, folders, weights=(0.6, 0.4), **data):
    datasets = (
        DatasetConfig(folders[0], weights[0]),
        DatasetConfig(folders[1], weights[1], keys=RLDS_KEYS),
    )
    return dataclasses.replace(config, data=DataConfig(datasets=datasets, **data))


def with_transforms(config):
    parts = open_datasets(config.data, config.policy)
    groups = compute_normalizations(parts, 4)
    tokenizer = Tokenizer.train(parts[0].source.tasks, 512)
    return [(part, make_transform(config.policy, part.robot, groups[part.stats], tokenizer)) for part in parts]


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_mixture_of_formats_reads_both_under_one_robot(config, folders):
    config = mixed(config, folders)
    parts = with_transforms(config)
    batches = take(make_loader(parts, config), 12)
    members = np.concatenate(
        [make_loader(parts, config)._prepare._stream(np.arange(6 * n, 6 * n + 6))[0] for n in range(12)]
    )
    assert set(members) == {0, 1}
    # Both hold the same episodes, so that whichever a sample came from, its state is one of LeRobot's.
    known = LeRobotDataset(folders[0]).columns("observation.state")
    stats = compute_stats(LeRobotDataset(folders[0]))["state"]
    states = np.concatenate([batch.observation.state[:, :6] for batch in batches]) * (stats.std + 1e-6) + stats.mean
    assert (np.abs(states[:, None] - known[None]).max(-1).min(1) < 1e-5).all()
    assert batches[0].observation.images["top"].shape == (6, 48, 48, 3)
    assert all(mask.all() for mask in batches[0].observation.image_masks.values())


@pytest.mark.parametrize("shards", [2, 3])
def test_the_stream_is_the_same_for_any_number_of_hosts(config, folders, shards):
    config = mixed(config, folders)
    parts = with_transforms(config)
    whole = take(make_loader(parts, config), 5)
    split = [take(make_loader(parts, config, rows), 5) for rows in np.split(np.arange(config.batch_size), shards)]
    for number, batch in enumerate(whole):
        assert_equal(batch, jax.tree.map(lambda *x: np.concatenate(x), *(one[number] for one in split)))


@pytest.mark.skipif("PI0_UNCHECKED" in os.environ, reason="this is the process that the test starts")
def test_worker_processes_give_the_same_batches_without_checked_annotations():
    # Functions whose annotations are checked cannot be sent to worker processes.
    name = "test_worker_processes_give_the_same_batches_and_resume_with_another_number"
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"{__file__}::{name}"]
    done = subprocess.run(command, env=os.environ | {"PI0_UNCHECKED": "1"}, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif("PI0_UNCHECKED" not in os.environ, reason="run by the test above, in a process of its own")
def test_worker_processes_give_the_same_batches_and_resume_with_another_number(config, folders):
    config = mixed(config, folders)
    parts = with_transforms(config)
    whole = take(make_loader(parts, config), 9)
    several = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2, prefetch=2))
    loader = make_loader(parts, several)
    first = list(itertools.islice(loader, 5))
    state = loader.get_state()
    loader.close()
    resumed = make_loader(parts, config)
    resumed.set_state(state)
    assert_equal(whole, first + take(resumed, 4))
    gauges = loader.gauges()
    assert 0 < gauges["input_wait"] <= 1
    assert sum(gauges[f"input_{name}"] for name in ("columns", "pictures", "transform")) == pytest.approx(1)


def test_a_process_reads_a_picture_before_it_has_threads(config, folders, monkeypatch):
    """TensorFlow Datasets exchanges `__import__` while it is imported: two threads of a process must not do that."""
    (_, transformed) = with_transforms(mixed(config, folders))
    reader = BatchReader(*transformed, config.policy.model)
    seen, images = [], RldsDataset.images
    monkeypatch.setattr(RldsDataset, "images", lambda self, *args: seen.append(args[0]) or images(self, *args))
    BatchReader.__new__(BatchReader).__setstate__(reader.__getstate__())
    assert sorted(seen) == ["observation/image_tool", "observation/image_top"]


def test_statistics_of_a_group_are_those_of_all_its_datasets(config, folders):
    config = mixed(config, folders)
    together = compute_normalizations(open_datasets(config.data, config.policy), 4)
    alone = compute_stats(LeRobotDataset(folders[0]))
    assert list(together) == ["tabletop"]  # both hold the same episodes: the same statistics
    for key in ("state", "actions"):
        np.testing.assert_allclose(together["tabletop"].stats[key].mean, alone[key].mean, rtol=1e-12)
        np.testing.assert_allclose(together["tabletop"].stats[key].std, alone[key].std, rtol=1e-12)
    data = dataclasses.replace(
        config.data, datasets=tuple(dataclasses.replace(d, stats=f"s{i}") for i, d in enumerate(config.data.datasets))
    )
    assert list(compute_normalizations(open_datasets(data, config.policy), 4)) == ["s0", "s1"]


def test_held_out_episodes_are_held_out_of_every_copy(config, folders):
    config = mixed(config, folders, validation_share=0.4)
    parts = open_datasets(config.data, config.policy)
    sides = []
    for part in parts:
        keys = np.array(part.source.episode_keys())
        sides.append((set(keys[part.training].tolist()), set(keys[part.held_out].tolist())))
        assert len(part.training) + len(part.held_out) == len(LENGTHS)
        assert len(part.held_out)
        assert len(part.training)
    assert sides[0] == sides[1]
    assert not sides[0][0] & sides[0][1]
    readied = with_transforms(config)
    states = [
        np.concatenate(
            [
                p.source.columns("observation.state")[slice(*p.source.episode_range(e))]
                for p in parts
                for e in getattr(p, side)
            ]
        )
        for side in ("training", "held_out")
    ]
    stats = compute_normalizations(parts, 4)["tabletop"].stats["state"]
    for batches, own in (
        (take(make_loader(readied, config), 20), states[0]),
        (eval_batches(readied, config), states[1]),
    ):
        seen = np.concatenate([b.observation.state[:, :6] for b in batches]) * (stats.std + 1e-6) + stats.mean
        assert (np.abs(seen[:, None] - own[None]).max(-1).min(1) < 1e-5).all()


@pytest.mark.parametrize(
    ("weights", "data", "message"),
    [
        ((0.5, None), {}, "give one to all of them or to none"),
        ((0.5, 0.0), {}, "a weight is above 0"),
        ((1.0, 1.0), {"validation_share": 1.5}, "0 or more and below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(config, folders, weights, data, message):
    config = mixed(config, folders, weights, **data)
    with pytest.raises(ValueError, match=message):
        open_datasets(config.data, config.policy)


def test_different_rates_are_refused_unless_they_are_to_be_mixed(config, tmp_path):
    slow, fast = write(tmp_path / "slow", (0,)), record(tmp_path / "fast")
    datasets = (DatasetConfig(str(slow)), DatasetConfig(str(fast), robot="so101"))
    message = r"5 frames per second in \S*slow, 30 frames per second in \S*fast\..*--data\.mixed-rates"
    with pytest.raises(UserError, match=message):
        open_datasets(DataConfig(datasets=datasets), config.policy)
    assert len(open_datasets(DataConfig(datasets=datasets, mixed_rates=True), config.policy)) == 2


def test_a_mixture_is_brought_to_one_rate(config, tmp_path, caplog):
    caplog.set_level("INFO")
    slow, fast = write(tmp_path / "slow", (0, 1)), record(tmp_path / "fast")
    datasets = (DatasetConfig(str(slow)), DatasetConfig(str(fast), robot="so101"))
    cameras = {"cameras": ("top", "base_0_rgb"), "action_horizon": 4}
    policy = dataclasses.replace(config.policy, model=dataclasses.replace(config.policy.model, **cameras))
    data = DataConfig(datasets=datasets, resample_fps=5)
    own, other = open_datasets(data, policy)
    assert isinstance(own.source, LeRobotDataset)  # it has that rate
    assert (other.source.fps, other.robot.fps) == (5, 5)
    assert "fast: from 30 to 5 frames per second; actions are shoulder_pan.pos" in caplog.text
    recorded = LeRobotDataset(fast)
    np.testing.assert_array_equal(
        other.source.columns("observation.state")[:4], recorded.columns("observation.state")[:24:6]
    )
    groups = compute_normalizations([own, other], 4)  # of what a chunk of that rate holds
    alone = compute_normalizations(open_datasets(DataConfig(str(fast)), dataclasses.replace(policy, robot="so101")), 4)
    assert (groups["so101"].stats["actions"].std[:5] > 1.5 * alone["so101"].stats["actions"].std[:5]).all()
    tokenizer = Tokenizer.train(own.source.tasks + other.source.tasks, 512)
    parts = [(part, make_transform(policy, part.robot, groups[part.stats], tokenizer)) for part in (own, other)]
    assert take(make_loader(parts, dataclasses.replace(config, policy=policy, data=data)), 1)[0].actions.shape == (
        6,
        4,
        8,
    )
    (wrong,) = open_datasets(DataConfig(str(fast), resample_fps=5), dataclasses.replace(policy, robot="so101"))
    with pytest.raises(UserError, match=r"so101 acts at 30.*--data\.resample-fps 30"):
        make_loader([(wrong, parts[1][1])], dataclasses.replace(config, policy=policy))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("other/data/meta/info.json", r"other is no dataset; did you mean \S*other/data\?"),
        ("other/data/1.0.0/features.json", r"other is no dataset; did you mean \S*other/data\?"),
        ("meta/info.json", r"other is no dataset; did you mean \S*\?"),
        ("other/x-train.tfrecord-00000-of-00001", "no features.json and dataset_info.json"),
        ("other/demo/a.hdf5", "which is HDF5.*pi0 data convert"),
        ("other/readme", "neither a LeRobot dataset"),
    ],
)
def test_a_folder_that_is_no_dataset_is_explained(config, tmp_path, make, message):
    (tmp_path / "other").mkdir()
    (tmp_path / make).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / make).touch()
    with pytest.raises(FileNotFoundError, match=message):
        open_datasets(DataConfig(str(tmp_path / "other")), config.policy)


def test_a_config_without_demonstrations_is_told_what_to_write(config):
    with pytest.raises(UserError, match=r'Set `data\.path` to .*data=DataConfig\(path="data/mine"\)'):
        open_datasets(DataConfig(), config.policy)


def test_an_open_dataset_has_the_cameras_that_the_model_reads(config, folders):
    policy = dataclasses.replace(config.policy, model=dataclasses.replace(config.policy.model, cameras=("tool", "x")))
    (dataset,) = open_datasets(DataConfig(folders[0]), policy)
    assert dataset.cameras == {"observation.images.tool": "tool"}
    assert dataset.semantics == ("absolute",) * 3


def test_names_that_a_dataset_lacks_are_to_be_said_in_its_keys(config, folders):
    datasets = (DatasetConfig(folders[1], keys={"action": "action/xyz"}),)
    with pytest.raises(
        ValueError,
        match=r"has no observation\.state;.*keys=\{'observation\.state': 'NAME'\};.*Did you mean 'observation/",
    ):
        open_datasets(DataConfig(datasets=datasets), config.policy)


def sources(root):
    """One of each kind of what is kept open, with limits that make several threads get in each other's way."""
    yield LeRobotDataset(write_v2(root / "video"))
    yield LeRobotDataset(write_v2(root / "pictures", pictures=True))
    for form in ("tfrecord", "array_record"):
        yield RldsDataset(write_rlds(root / form, form, shards=5), 5)
    recorded = LeRobotDataset(write(root / "cached"))
    build_cache(recorded, root / "cache", ["observation.images.top"], 32, workers=1)
    yield CachedFrames(recorded, root / "cache", ["observation.images.top"], 32)


def test_several_threads_get_the_frames_that_one_gets(tmp_path, monkeypatch):
    for name in (
        "rlds.reader.SHARDS_OPEN",
        "rlds.reader.EPISODES_KEPT",
        "lerobot.reader.ROW_GROUPS_KEPT",
        "cache.SHARDS_OPEN",
    ):
        monkeypatch.setattr(f"pi0_jax.data.{name}", 1)
    monkeypatch.setattr("pi0_jax.data.cache.FRAMES_PER_SHARD", 10)
    orders = [np.random.default_rng(seed).permutation(34)[:8] for seed in range(40)]
    for source in sources(tmp_path):
        camera = source.cameras[0]
        expected = [source.images(camera, rows) for rows in orders]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for alone, together in zip(
                expected, pool.map(lambda rows: source.images(camera, rows), orders), strict=True
            ):
                np.testing.assert_array_equal(alone, together)
