"""RLDS without tensorflow: both file formats give the recorded episodes, and damage names its record."""

import dataclasses
import errno
import json
import pickle
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("google_crc32c")

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.loader import make_loader
from pi0_jax.data.mixture import open_datasets, open_source
from pi0_jax.data.rlds.reader import RldsDataset
from pi0_jax.data.robots import RldsNames, get_robot
from pi0_jax.data.source import BadEpisode, Renamed
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.data.transform import make_transform
from pi0_jax.errors import UserError
from tests.data.conftest import TASKS, episode
from tests.data.formats import CAMERAS, RLDS_KEYS, write_rlds

ORDER = (0, 2, 4, 1, 3)
"""Episodes as the two shards hold them."""
FORMATS = ("tfrecord", "array_record")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return {form: write_rlds(tmp_path_factory.mktemp(form), form) for form in FORMATS}


def opened(root, **options):
    return Renamed(RldsDataset(root, 5, **options), RLDS_KEYS)


def expected(name, numbers=ORDER):
    return np.concatenate([episode(number)[name] for number in numbers])


@pytest.mark.parametrize("form", FORMATS)
def test_both_formats_give_what_was_recorded(roots, form):
    dataset = opened(roots[form])
    for name in ("observation.state", "action", "valid"):
        np.testing.assert_array_equal(dataset.columns(name), expected(name))
    rows = np.random.default_rng(0).permutation(dataset.num_frames)
    for camera in CAMERAS:
        np.testing.assert_array_equal(dataset.images(camera, rows), expected(camera)[rows])
    starts = [dataset.episode_range(number)[0] for number in range(5)]
    assert [dataset.task(start) for start in starts] == [TASKS[number] for number in ORDER]
    np.testing.assert_array_equal(dataset.shard_ends, [9 + 12 + 7, 34])
    assert "tensorflow" not in sys.modules


def test_an_episode_has_one_key_in_every_format(roots, dataset):
    keys = dataset.episode_keys()
    for form in FORMATS:
        assert opened(roots[form]).episode_keys() == [keys[number] for number in ORDER]


def test_the_index_is_made_once_and_again_for_changed_shards(tmp_path, monkeypatch):
    root = write_rlds(tmp_path, episodes=range(4))
    opened(root)
    monkeypatch.setattr("pi0_jax.data.rlds.index._index_shard", lambda *_: pytest.fail("indexed again"))
    opened(root.parent)  # the dataset's folder stands for its newest version
    monkeypatch.undo()
    shard = next(root.glob("*-00000-of-*"))
    shutil.copy(next(root.glob("*-00001-of-*")), shard)
    np.testing.assert_array_equal(opened(root).columns("action"), expected("action", (1, 3, 1, 3)))


def test_a_full_disk_is_named_with_the_way_out(roots, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("pi0_jax.data.rlds.index.written", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match=r"no room for the index of tiny\. Set PI0_CACHE"):
        RldsDataset(roots["tfrecord"], 5, cache=tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_pickled_dataset_reads_the_same(roots, form):
    dataset = opened(roots[form])
    image = dataset.image(20, CAMERAS[0])
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again.image(20, CAMERAS[0]), image)


def test_columns_are_read_by_episode(roots):
    dataset = opened(roots["tfrecord"])
    np.testing.assert_array_equal(dataset.read("action", np.array([1, 2, 3])), expected("action", ORDER[1:4]))


def test_episodes_can_be_chosen_by_their_path(roots):
    dataset = opened(roots["tfrecord"], only="success")
    np.testing.assert_array_equal(dataset.columns("action"), expected("action", (0, 2, 4)))
    rows = np.arange(dataset.num_frames)
    np.testing.assert_array_equal(dataset.images(CAMERAS[1], rows), expected(CAMERAS[1], (0, 2, 4)))
    with pytest.raises(ValueError, match="no episode whose file_path contains 'nothing'; it has 5"):
        opened(roots["tfrecord"], only="nothing")


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (40, "record 0, which is episode 0 of this shard, is damaged: its checksum"),
        (2, "record 0, which is episode 0 of this shard, has a damaged length"),
    ],
)
def test_a_bad_checksum_names_file_and_episode_and_can_be_skipped(roots, tmp_path, offset, message):
    root = shutil.copytree(roots["tfrecord"], tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    shard = next(root.glob("*-00000-of-*"))
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadEpisode, match=rf"tiny-train\.tfrecord-00000-of-00002: {message}"):
        opened(root)
    rest = opened(root, skip_bad_episodes=True)
    kept = (2, 4, 1, 3) if offset == 40 else (1, 3)  # without lengths the rest of a shard cannot be found
    np.testing.assert_array_equal(rest.columns("action"), expected("action", kept))
    rows = np.arange(rest.num_frames)
    np.testing.assert_array_equal(rest.images(CAMERAS[0], rows), expected(CAMERAS[0], kept))
    lost = (0,) if offset == 40 else (0, 1, 2)
    assert list(rest.skipped) == [f"episode {n} of tiny-train.tfrecord-00000-of-00002" for n in lost]


@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_that_is_cut_short_or_missing_is_named(roots, tmp_path, form):
    root = shutil.copytree(roots[form], tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    shard = next(root.glob("*-00001-of-*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(BadEpisode, match=r"00001-of-00002: record \d.*(cut short|missing)"):
        opened(root)
    assert opened(root, skip_bad_episodes=True).num_episodes in (3, 4)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks \['tiny-train.*00001-of-00002'\], 1 of 2 shards"):
        opened(root)


def test_wrong_names_are_explained(roots, tmp_path):
    with pytest.raises(ValueError, match=r"no instruction 'text'; its text is \['language_instruction'\]"):
        opened(roots["tfrecord"], task="text")
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        opened(roots["tfrecord"], split="test")
    with pytest.raises(FileNotFoundError, match=r"features\.json"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["bridge", "droid", "droid_velocity", "fractal"])
def test_published_datasets_have_what_their_robots_need(name):
    robot = get_robot(name)
    assert robot.rlds is not None
    assert {"observation.state", "action", *robot.cameras} <= set(robot.rlds.keys)
    assert robot.rlds.fps == robot.fps


def test_a_robots_published_names_are_used_where_the_features_are_there(roots):
    robot = dataclasses.replace(get_robot("tabletop"), rlds=RldsNames(RLDS_KEYS, 5, only="success"))
    source = open_source(DatasetConfig(str(roots["tfrecord"])), DataConfig(), robot)
    np.testing.assert_array_equal(source.columns("observation.state"), expected("observation.state", (0, 2, 4)))
    other = dataclasses.replace(robot, rlds=RldsNames({**RLDS_KEYS, "action": "action/joints"}, 5))
    with pytest.raises(ValueError, match=r"has no observation\.state"):
        open_source(DatasetConfig(str(roots["tfrecord"])), DataConfig(), other)


def without_instruction(root, tmp_path):
    """A copy of a dataset whose description has no text."""
    copy = shutil.copytree(root, tmp_path / root.parent.name / root.name)
    content = json.loads((copy / "features.json").read_text())
    steps = content["content"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    del steps["language_instruction"]
    (copy / "features.json").write_text(json.dumps(content))
    return copy


def test_without_any_text_episodes_have_no_instruction(roots, tmp_path):
    dataset = RldsDataset(without_instruction(roots["tfrecord"], tmp_path), 5)
    assert dataset.tasks == [""]
    assert dataset.task(dataset.num_frames - 1) == ""


def test_an_instruction_of_another_name_is_found(roots):
    dataset = RldsDataset(roots["tfrecord"], 5)

    def found(*names, task=None):
        dataset.features = {name: {"dtype": "string", "shape": ()} for name in names}
        return dataset._find_task(task)

    assert found("language_instruction", "language_instruction_2") == "language_instruction"
    assert found("observation/natural_language_instruction", "note") == "observation/natural_language_instruction"
    assert found("words") == "words"
    assert found("a", "b", task="b") == "b"
    with pytest.raises(UserError, match=r"its text is \['a', 'b'\]\. Set `task`"):
        found("a", "b")


@pytest.mark.parametrize("form", FORMATS)
def test_a_camera_is_masked_where_it_is_said_to_be_missing_and_its_pictures_are_blank(tmp_path, form, caplog):
    caplog.set_level("INFO")
    dataset = opened(write_rlds(tmp_path, form, blank=(2, 3)))
    assert dataset.camera_mask(CAMERAS[0]).all()
    np.testing.assert_array_equal(dataset.camera_mask(CAMERAS[1]), [True, False, True, True, False])
    dataset.camera_mask(CAMERAS[1])
    said = "has_image_tool is 0 in 2 of 5 episodes, whose pictures are blank: this camera is masked there"
    assert caplog.text.count(said) == 1
    assert "has_image_top is 0 in 5 of 5 episodes, but pictures are there in 5 of 5 looked at: it is not" in caplog.text


def test_without_a_word_about_cameras_all_are_there(roots, dataset):
    assert opened(roots["tfrecord"]).camera_mask(CAMERAS[0]).all()
    assert dataset.camera_mask(CAMERAS[1]).all()


def test_batches_are_masked_by_the_episodes_of_their_frames(tmp_path, config):
    data = DataConfig(datasets=(DatasetConfig(str(write_rlds(tmp_path, blank=(2, 3))), keys=RLDS_KEYS),))
    (part,) = open_datasets(data, config.policy)
    tokenizer = Tokenizer.train(part.source.tasks, 512)
    transform = make_transform(config.policy, part.robot, compute_normalizations([part], 4)["tabletop"], tokenizer)
    loader = make_loader([(part, transform)], dataclasses.replace(config, batch_size=34))
    batch = next(loader)
    loader.close()
    masks, images = batch.observation.image_masks, batch.observation.images
    assert masks["top"].all()
    np.testing.assert_array_equal(masks["tool"], images["tool"].reshape(34, -1).max(1) > 0)
    assert 0 < masks["tool"].sum() < 34
