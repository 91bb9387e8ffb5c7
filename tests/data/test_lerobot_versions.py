"""Versions 2.0, 2.1 and 3.0 read alike, frames are the right frames in every codec, and damage names its episode."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0_jax.data.files import find_dataset
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.source import BadEpisode, Renamed
from pi0_jax.data.video import VideoWriter
from pi0_jax.errors import UserError
from tests.data.conftest import FEATURES, LENGTHS, TASKS, all_frames, episode, write
from tests.data.formats import CAMERAS, write_v2


@pytest.fixture(scope="module")
def v21(tmp_path_factory):
    return write_v2(tmp_path_factory.mktemp("v2") / "data", crf=12)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_older_versions_give_the_same_columns_tasks_and_chunks(v21, dataset, tmp_path, version):
    root = shutil.copytree(v21, tmp_path / "data")
    info = root / "meta/info.json"
    info.write_text(info.read_text().replace("v2.1", version))
    older = LeRobotDataset(root)
    assert older.version == version
    for name in ("observation.state", "action", "valid"):
        np.testing.assert_array_equal(older.columns(name), dataset.columns(name))
    assert [older.task(i) for i in range(older.num_frames)] == [dataset.task(i) for i in range(dataset.num_frames)]
    assert (older.fps, older.cameras, older.num_episodes) == (dataset.fps, dataset.cameras, dataset.num_episodes)
    for ours, theirs in zip(older.chunk(np.arange(34), 4), dataset.chunk(np.arange(34), 4), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def own_frame_is_nearest(decoded, truth):
    distance = np.square(decoded[:, None].astype(float) - truth[None]).mean((2, 3, 4))
    return (distance.argmin(1) == np.arange(len(truth))).all()


def test_frames_of_many_files_belong_to_their_rows(v21):
    older = LeRobotDataset(v21)
    truth = {camera: np.concatenate([episode(n)[camera] for n in range(5)]) for camera in CAMERAS}
    order = np.random.default_rng(0).permutation(older.num_frames)
    for camera in CAMERAS:
        assert own_frame_is_nearest(older.images(camera, order)[np.argsort(order)], truth[camera])
        np.testing.assert_array_equal(older.image(11, camera), older.images(camera, np.array([[11]]))[0, 0])


def test_frames_in_any_order_are_those_of_decoding_in_order(dataset):
    rows = np.array([[33, 0], [9, 20], [20, 21]])
    for camera in dataset.cameras:
        np.testing.assert_array_equal(dataset.images(camera, rows), all_frames(dataset, camera)[rows])


def test_a_file_reader_keeps_few_files_open(v21):
    random = LeRobotDataset(v21)
    random.image(0, CAMERAS[0])
    random.opened()["reader"]._max_open = 2
    random.images(CAMERAS[0], np.arange(34))
    assert len(random.opened()["reader"]._opened) == 2


def test_pictures_inside_parquet_are_read_exactly(tmp_path):
    stored = LeRobotDataset(write_v2(tmp_path / "data", pictures=True))
    assert stored.cameras == tuple(CAMERAS)
    truth = np.concatenate([episode(n)[CAMERAS[1]] for n in range(5)])
    order = np.random.default_rng(0).permutation(34)
    np.testing.assert_array_equal(stored.images(CAMERAS[1], order), truth[order])
    np.testing.assert_array_equal(all_frames(stored, CAMERAS[1])[5], truth[5])


def test_shapes_with_channels_first_are_turned_round(tmp_path):
    root = write_v2(tmp_path / "data", "v2.0", pictures=True)
    path = root / "meta/info.json"
    path.write_text(path.read_text().replace("[48, 48, 3]", "[3, 48, 48]"))
    stored = LeRobotDataset(root)
    assert [stored.features[camera]["shape"] for camera in CAMERAS] == [(48, 48, 3)] * 2
    np.testing.assert_array_equal(stored.image(30, CAMERAS[1]), episode(4)[CAMERAS[1]][3])


def test_tasks_may_change_within_an_episode(tmp_path):
    from pi0_jax.data.lerobot import LeRobotWriter

    texts = ["reach"] * 4 + ["push"] * 5
    with LeRobotWriter(tmp_path / "data", 5, "tabletop", FEATURES) as writer:
        writer.add_episode(episode(0), texts)
    again = LeRobotDataset(tmp_path / "data")
    assert [again.task(i) for i in range(9)] == texts


def test_a_pickled_dataset_reads_the_same_and_carries_no_frames(dataset):
    all_frames(dataset, CAMERAS[0])
    content = pickle.dumps(dataset)
    assert len(content) < 20_000
    again = pickle.loads(content)
    np.testing.assert_array_equal(again.columns("action"), dataset.columns("action"))
    np.testing.assert_array_equal(again.image(3, CAMERAS[0]), dataset.image(3, CAMERAS[0]))


def test_renamed_features_are_read_under_their_new_names(dataset):
    renamed = Renamed(dataset, {"front": CAMERAS[0], "both": "action + valid", "action": "action"})
    np.testing.assert_array_equal(renamed.image(3, "front"), dataset.image(3, CAMERAS[0]))
    expected = np.concatenate([dataset.columns("action"), dataset.columns("valid")], 1)
    np.testing.assert_array_equal(renamed.columns("both"), expected)
    np.testing.assert_array_equal(renamed.columns("action"), dataset.columns("action"))
    assert renamed.cameras == (CAMERAS[1], "front")
    with pytest.raises(ValueError, match=r"no feature \['actoin'\].*Did you mean 'action'\?"):
        Renamed(dataset, {"x": "actoin"})


# Damage.


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def shorten(path):
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 1), path)


def widen_rows(path, numbers):
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    for number in numbers:
        rows[number] = [*rows[number], 0.0]
    pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(rows)), path)


DATA, VIDEO = "data/chunk-001/episode_000002.parquet", f"videos/chunk-001/{CAMERAS[0]}/episode_000002.mp4"
DAMAGE = {
    "truncated video": (VIDEO, truncate, BadEpisode),
    "missing video": (VIDEO, lambda path: path.unlink(), FileNotFoundError),
    "missing parquet": (DATA, lambda path: path.unlink(), FileNotFoundError),
    "truncated parquet": (DATA, truncate, BadEpisode),
    "too few rows": (DATA, shorten, BadEpisode),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_names_file_and_episode_and_can_be_skipped(v21, tmp_path, kind):
    root = shutil.copytree(v21, tmp_path / "data")
    name, damage, error = DAMAGE[kind]
    damage(root / name)
    broken = LeRobotDataset(root)
    with pytest.raises(error, match=r"episode[ _0]*2") as raised:
        _ = broken.columns("action"), broken.images(CAMERAS[0], np.arange(34))
    assert name.split("/")[-1] in str(raised.value)
    rest = LeRobotDataset(root, skip_bad_episodes=True)
    assert list(rest.skipped) == ["episode 2"]
    assert rest.episodes == ["episode 0", "episode 1", "episode 3", "episode 4"]
    kept = [0, 1, 3, 4]
    np.testing.assert_array_equal(rest.columns("action"), np.concatenate([episode(n)["action"] for n in kept]))
    truth = np.concatenate([episode(n)[CAMERAS[0]] for n in kept])
    assert own_frame_is_nearest(rest.images(CAMERAS[0], np.arange(rest.num_frames)), truth)
    assert [rest.task(start) for start in np.cumsum([0, 9, 5, 1])] == [TASKS[n] for n in kept]


def test_a_row_of_another_length_names_its_episode(v21, tmp_path):
    root = shutil.copytree(v21, tmp_path / "data")
    widen_rows(root / DATA, (2,))
    with pytest.raises(BadEpisode, match=r"episode_000002.parquet: column 'action'.*row 2, in episode 2, has 4"):
        LeRobotDataset(root).columns("action")


def test_of_a_file_with_rows_of_other_lengths_only_their_episodes_are_skipped(tmp_path):
    root = write(tmp_path / "data")
    widen_rows(root / "data/chunk-000/file-000.parquet", (3, 10, 33))  # of episodes 0, 1 and 4
    rest = LeRobotDataset(root, skip_bad_episodes=True)
    assert list(rest.skipped) == ["episode 0", "episode 1", "episode 4"]
    assert all("column 'action'" in reason for reason in rest.skipped.values())
    np.testing.assert_array_equal(rest.columns("action"), np.concatenate([episode(n)["action"] for n in (2, 3)]))
    truth = np.concatenate([episode(n)[CAMERAS[0]] for n in (2, 3)])
    assert own_frame_is_nearest(rest.images(CAMERAS[0], np.arange(13)), truth)


def test_a_frame_that_the_decoder_had_to_fill_in_is_an_error(v21, tmp_path):
    root = shutil.copytree(v21, tmp_path / "data")
    path = root / VIDEO
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + len(content) // 2
    content[start : start + 300] = np.random.default_rng(0).bytes(300)
    path.write_bytes(content)
    with pytest.raises(BadEpisode, match=r"episode_000002\.mp4: frame .* cannot be decoded.*episode 2.*without_epis"):
        LeRobotDataset(root).images(CAMERAS[0], np.arange(34))


def test_episodes_are_left_out_by_their_numbers(v21, tmp_path):
    rest = LeRobotDataset(v21, without=(0, 3))
    assert rest.episodes == ["episode 1", "episode 2", "episode 4"]
    np.testing.assert_array_equal(rest.columns("action"), np.concatenate([episode(n)["action"] for n in (1, 2, 4)]))
    truth = np.concatenate([episode(n)[CAMERAS[0]] for n in (1, 2, 4)])
    assert own_frame_is_nearest(rest.images(CAMERAS[0], np.arange(24)), truth)
    with pytest.raises(ValueError, match=r"no episodes \[7\] to leave out; it has 5"):
        LeRobotDataset(v21, without=(0, 7))


def test_in_a_shared_file_only_the_episodes_without_frames_are_skipped(tmp_path):
    root = write(tmp_path / "data")
    path = root / f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"
    path.unlink()
    writer = VideoWriter(path, (48, 48), 5, "yuv444p", 4)
    for number in range(3):  # as long as the first three episodes, and two frames of the fourth are none
        writer.write(episode(number)[CAMERAS[0]])
    writer.close()
    with pytest.raises(BadEpisode, match=r"holds 26 frames; the metadata count 34.*episode 3, episode 4"):
        all_frames(LeRobotDataset(root), CAMERAS[0])
    rest = LeRobotDataset(root, skip_bad_episodes=True)
    assert rest.episodes == ["episode 0", "episode 1", "episode 2"]
    assert rest.num_frames == sum(LENGTHS[:3])
    assert len(all_frames(rest, CAMERAS[0])) == rest.num_frames
    assert len(all_frames(LeRobotDataset(root, without=(3, 4)), CAMERAS[0])) == rest.num_frames


def test_an_unknown_codec_is_named(v21, tmp_path):
    root = shutil.copytree(v21, tmp_path / "data")
    content = (root / VIDEO).read_bytes()
    assert content.count(b"avc1") >= 1
    (root / VIDEO).write_bytes(content.replace(b"avc1", b"zzz9"))
    with pytest.raises(BadEpisode, match=r"episode_000002\.mp4 cannot be decoded.*codec.*episode 2"):
        LeRobotDataset(root).image(20, CAMERAS[0])
    assert list(LeRobotDataset(root, skip_bad_episodes=True).skipped) == ["episode 2"]


def test_a_dataset_with_no_good_episode_is_refused(v21, tmp_path):
    root = shutil.copytree(v21, tmp_path / "data")
    shutil.rmtree(root / "data")
    with pytest.raises(ValueError, match="has no episode that can be read"):
        LeRobotDataset(root, skip_bad_episodes=True)


def test_the_hub_is_asked_only_for_its_own_paths(tmp_path, monkeypatch):
    import sys
    import types

    assert find_dataset(str(tmp_path)) == tmp_path
    asked = []
    module = types.SimpleNamespace(snapshot_download=lambda *args, **kwargs: asked.append((args, kwargs)) or "/there")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    for offline in (False, True):
        assert str(find_dataset("hf://owner/name", offline)) == "/there"
        expected = {"repo_type": "dataset", "local_files_only": offline, "ignore_patterns": None}
        assert asked.pop() == (("owner/name",), expected)
    find_dataset("hf://datasets/owner/name", videos=False)
    assert asked.pop()[1]["ignore_patterns"] == ["videos/*"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[hub\]'"):
        find_dataset("hf://owner/name")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("episodes.jsonl", '"episode_index": 2', '"episode_index": 1', r"lists episodes \[1\] more than once"),
        (
            "episodes.jsonl",
            '"length": 5',
            '"len": 5',
            r"line 2 of .*episodes\.jsonl is .* with episode_index and length",
        ),
        ("tasks.jsonl", '"task": "push', '"text": "push', r"line 2 of .*tasks\.jsonl is .* with task_index and task"),
        (
            "tasks.jsonl",
            '"task_index": 1',
            '"task_index": 3',
            r"has no task 1, of 0 to 3\. .*{task_index: 1, task: ''}",
        ),
        ("info.json", '"fps"', '"rate"', r"info\.json lacks \['fps'\]"),
        ("info.json", '"fps": 5', '"fps": 0', r"gives 0 frames per second"),
        ("info.json", '"video_path"', '"path"', r"video, and no `video_path`"),
        ("info.json", '"shape"', '"size"', r"dtype and shape of the features \['observation\.images\.top'\]"),
        ("info.json", '"total_frames": 34', '"total_frames": 35', r"or correct `total_frames`"),
    ],
)
def test_metadata_that_contradict_the_format_are_named(v21, tmp_path, file, old, new, message):
    root = shutil.copytree(v21, tmp_path / "data")
    text = (root / "meta" / file).read_text()
    assert old in text
    (root / "meta" / file).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        LeRobotDataset(root)


def test_a_column_that_nobody_uses_and_is_not_there_does_no_harm(v21, tmp_path):
    root = shutil.copytree(v21, tmp_path / "data")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert LeRobotDataset(root, skip_bad_episodes=True).skipped == {}


@pytest.mark.parametrize("number", [-1, 3])
def test_a_task_that_there_is_not_is_named_with_its_episode(v21, tmp_path, number):
    root = shutil.copytree(v21, tmp_path / "data")
    path = root / "data/chunk-001/episode_000002.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("task_index")
    pq.write_table(table.set_column(at, "task_index", pa.array([number] * table.num_rows)), path)
    with pytest.raises(UserError, match=rf"episode 2 has task_index {number}; meta/ has 3 tasks"):
        _ = LeRobotDataset(root).task_index
