"""LeRobot v3.0: what is written can be read, equals lerobot's own layout, and damage is reported."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter
from pi0_jax.data.lerobot.layout import BOOKKEEPING
from tests.data.conftest import FEATURES, LENGTHS, TASKS, all_frames, episode, write

PARQUETS = (
    "data/chunk-000/file-000.parquet",
    "meta/tasks.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9))


def frames_of(dataset, number):
    start, end = dataset.episode_range(number)
    return slice(start, end)


@pytest.fixture
def copy(dataset, tmp_path):
    """A copy that may be damaged, without decoded video."""
    return shutil.copytree(dataset.root, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))


def test_columns_come_back_exactly(dataset):
    for number in range(len(LENGTHS)):
        for name in ("observation.state", "action", "valid"):
            np.testing.assert_array_equal(dataset.columns(name)[frames_of(dataset, number)], episode(number)[name])
    assert dataset.num_frames == sum(LENGTHS)
    assert dataset.num_episodes == len(LENGTHS)
    assert dataset.fps == 5


def test_bookkeeping_counts_frames_and_episodes(dataset):
    np.testing.assert_array_equal(dataset.columns("index")[:, 0], np.arange(sum(LENGTHS)))
    np.testing.assert_array_equal(dataset.columns("episode_index")[:, 0], np.repeat(np.arange(5), LENGTHS))
    np.testing.assert_array_equal(
        dataset.columns("frame_index")[:, 0], np.concatenate([np.arange(length) for length in LENGTHS])
    )
    np.testing.assert_allclose(dataset.columns("timestamp"), dataset.columns("frame_index") / 5, rtol=1e-6)


def test_tasks_come_back_and_equal_ones_share_an_index(dataset):
    assert dataset.tasks == ["reach the red block", "push the blue ball", "reach the puck"]
    assert [dataset.task(dataset.episode_range(number)[0]) for number in range(5)] == list(TASKS)


@pytest.mark.parametrize("camera", ["observation.images.top", "observation.images.tool"])
def test_each_frame_comes_back_with_its_small_coloured_objects(dataset, camera):
    for number in range(len(LENGTHS)):
        for image, i in zip(episode(number)[camera], range(*dataset.episode_range(number)), strict=True):
            decoded = dataset.image(i, camera)
            coloured = np.ptp(image.astype(int), axis=-1) > 90
            assert psnr(decoded, image) > 42
            assert psnr(decoded[coloured], image[coloured]) > 36


def test_dataset_split_into_many_files_reads_the_same(dataset, tmp_path):
    root = write(tmp_path / "split", data_file_mb=1e-9, video_file_mb=0.03)
    split = LeRobotDataset(root)
    assert len(list(root.glob("data/*/*.parquet"))) == len(LENGTHS)
    assert 1 < len(list(root.glob("videos/observation.images.top/*/*.mp4"))) < len(LENGTHS)
    np.testing.assert_array_equal(split.columns("action"), dataset.columns("action"))
    for camera in dataset.cameras:
        assert psnr(all_frames(split, camera), all_frames(dataset, camera)) > 45


def test_chunk_repeats_the_last_action_beyond_the_end_and_masks_it(dataset):
    start, end = dataset.episode_range(1)
    actions = dataset.columns("action")
    chunk, mask = dataset.chunk(end - 2, 4)
    np.testing.assert_array_equal(chunk, actions[[end - 2, end - 1, end - 1, end - 1]])
    np.testing.assert_array_equal(mask, [True, True, False, False])
    many, masks = dataset.chunk(np.array([start, end - 2]), 4)
    np.testing.assert_array_equal(many[1], chunk)
    np.testing.assert_array_equal(masks, [[True] * 4, [True, True, False, False]])


def test_stats_are_those_of_the_whole_dataset(dataset):
    stats = json.loads((dataset.root / "meta/stats.json").read_text())
    actions = dataset.columns("action").astype(float)
    np.testing.assert_allclose(stats["action"]["q01"], np.quantile(actions, 0.01, axis=0))
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0))
    assert stats["action"]["count"] == [sum(LENGTHS)]
    images = np.concatenate([episode(number)["observation.images.top"] for number in range(5)]) / 255
    top = {key: np.array(value).squeeze() for key, value in stats["observation.images.top"].items()}
    np.testing.assert_allclose(top["mean"], images.mean((0, 1, 2)))
    np.testing.assert_allclose(top["std"], images.std((0, 1, 2)))
    for key, share in (("min", 0), ("q50", 0.5), ("q99", 0.99), ("max", 1)):
        np.testing.assert_allclose(top[key], np.quantile(images, share, axis=(0, 1, 2)), atol=1 / 255)


def test_layout_equals_what_lerobot_writes(fixtures, tmp_path):
    reference = LeRobotDataset(fixtures / "lerobot_v3_tiny")
    names = [name for name in reference.features if name not in BOOKKEEPING]
    features = {name: reference.features[name] for name in names}
    root = tmp_path / "written"
    with LeRobotWriter(root, reference.fps, "sawyer_sim", features) as writer:
        for number in range(reference.num_episodes):
            rows = frames_of(reference, number)
            columns = {
                name: (all_frames(reference, name) if name in reference.cameras else reference.columns(name))[rows]
                for name in names
            }
            writer.add_episode(columns, reference.task(rows.start))
    for path in PARQUETS:
        ours, theirs = pq.read_table(root / path), pq.read_table(reference.root / path)
        assert ours.schema.equals(theirs.schema), path
        if path != PARQUETS[2]:
            assert ours.equals(theirs), path
    ours, theirs = (json.loads((path / "meta/info.json").read_text()) for path in (root, reference.root))
    assert list(ours) == list(theirs)
    assert list(ours["features"]) == list(theirs["features"])
    for camera in reference.cameras:
        changed = {"video.codec", "video.pix_fmt", "video.crf", "video.preset"}
        info, reference_info = ours["features"][camera].pop("info"), theirs["features"][camera].pop("info")
        assert list(info) == list(reference_info)
        assert {key for key in info if info[key] != reference_info[key]} == changed
    assert ours == theirs
    ours, theirs = (json.loads((path / "meta/stats.json").read_text()) for path in (root, reference.root))
    assert set(ours) == set(theirs)
    for name in ours:
        assert list(ours[name]) == list(theirs[name])
        for key in ours[name]:
            assert np.shape(ours[name][key]) == np.shape(theirs[name][key])
            if key in ("mean", "std", "count", "min", "max"):
                np.testing.assert_allclose(ours[name][key], theirs[name][key], atol=2e-2 if "image" in name else 1e-5)


def test_reads_lerobots_own_av1_video_in_step(fixtures, tmp_path):
    """The frames of a moving scene follow their rows: the neighbours of a frame look more alike than strangers."""
    dataset = LeRobotDataset(fixtures / "lerobot_v3_tiny")
    frames = all_frames(dataset, "observation.images.front").astype(float)
    assert frames.shape == (250, 96, 96, 3)
    jumps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    starts = np.array([dataset.episode_range(number)[0] for number in range(1, 5)])
    assert set(np.argsort(jumps)[-4:] + 1) == set(starts)


def test_the_documentation_writes_a_dataset_from_other_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "LeRobotWriter" in block)
    actions = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    images = np.zeros((3, 240, 320, 3), np.uint8)
    exec(code, {"demonstrations": [(images, actions, actions, "reach"), (images, actions, actions, "push")]})
    made = LeRobotDataset("data/mine")
    assert (made.num_frames, made.fps, made.tasks) == (6, 20, ["reach", "push"])
    np.testing.assert_array_equal(made.columns("action"), np.tile(actions, (2, 1)))


def test_nothing_is_written_into_a_dataset(copy):
    before = sorted(copy.rglob("*"))
    dataset = LeRobotDataset(copy, skip_bad_episodes=True)
    for camera in dataset.cameras:
        all_frames(dataset, camera)
    assert sorted(copy.rglob("*")) == before


def test_existing_folder_is_refused_or_replaced(tmp_path):
    root = write(tmp_path / "data", [0])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(root, [1])
    assert LeRobotDataset(root).num_frames == LENGTHS[0]
    write(root, [1], overwrite=True)
    assert LeRobotDataset(root).num_frames == LENGTHS[1]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def fail_while_recording(root):
    with LeRobotWriter(root, 5, "tabletop", FEATURES, overwrite=True) as writer:
        writer.add_episode(episode(1), "reach")
        raise KeyboardInterrupt


def test_interrupted_recording_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_while_recording(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
    root = write(tmp_path / "data", [0])
    with pytest.raises(KeyboardInterrupt):
        fail_while_recording(root)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert LeRobotDataset(root).num_frames == LENGTHS[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros((5, 2), np.float32)}, r"'action' came as float32\[5, 2\]; expected float32\['n', 3\]"),
        ({"action": np.full((5, 3), np.nan, np.float32)}, "NaN or infinity in frames"),
        ({"action": np.zeros((4, 3), np.float32)}, "one common length"),
        ({"observation.images.top": np.zeros((5, 48, 48, 3), np.float32)}, "expected uint8"),
        ({"extra": np.zeros((5, 1), np.float32)}, "'extra'"),
    ],
)
def test_wrong_episode_is_refused_and_says_why(tmp_path, change, message):
    writer = LeRobotWriter(tmp_path / "data", 5, "tabletop", FEATURES)
    with pytest.raises(ValueError, match=message):
        writer.add_episode(episode(1) | change, "reach")
    with pytest.raises(ValueError, match="no episode was added"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"dtype": "video", "shape": (47, 48, 3)}, "even height"),
        ({"dtype": "video", "shape": (3, 48, 48)}, "height, width, 3"),
        ({"dtype": "string", "shape": (1,)}, "number type"),
        ({"dtype": "float32", "shape": (2, 2)}, "number type"),
    ],
)
def test_feature_that_cannot_be_stored_is_refused(tmp_path, feature, message):
    with pytest.raises(ValueError, match=message):
        LeRobotWriter(tmp_path / "data", 5, "tabletop", {"thing": feature})


def test_missing_folder_and_missing_files_are_named(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        LeRobotDataset(tmp_path / "nowhere")
    (copy / "videos/observation.images.tool/chunk-000/file-000.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"observation.images.tool/chunk-000/file-000.mp4"):
        all_frames(LeRobotDataset(copy), "observation.images.tool")
    (copy / "data/chunk-000/file-000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"data/chunk-000/file-000\.parquet"):
        LeRobotDataset(copy).columns("action")
    shutil.rmtree(copy / "meta/episodes")
    with pytest.raises(FileNotFoundError, match="meta/episodes"):
        LeRobotDataset(copy)
    (copy / "meta/info.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"meta/info\.json"):
        LeRobotDataset(copy)


def test_unknown_version_is_named(copy):
    path = copy / "meta/info.json"
    path.write_text(path.read_text().replace("v3.0", "v1.6"))
    with pytest.raises(ValueError, match=r"version v1\.6; v2\.0, v2\.1, v3\.0 can be read"):
        LeRobotDataset(copy)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_video_and_parquet_are_reported(copy, share):
    video = copy / "videos/observation.images.top/chunk-000/file-000.mp4"
    content = video.read_bytes()
    video.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"file-000\.mp4(: frame \d+)? (cannot be decoded|holds \d+ frames)"):
        all_frames(LeRobotDataset(copy), "observation.images.top")
    table = copy / "data/chunk-000/file-000.parquet"
    content = table.read_bytes()
    table.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"file-000\.parquet cannot be read"):
        LeRobotDataset(copy).columns("action")


@pytest.mark.parametrize(("episodes", "says"), [([0, 1], "20 are missing"), ([0, 1, 2, 3, 4, 0], "9 are too many")])
def test_video_with_another_number_of_frames_than_its_episodes_is_refused_with_numbers(copy, tmp_path, episodes, says):
    other = write(tmp_path / "other", episodes)
    name = "videos/observation.images.top/chunk-000/file-000.mp4"
    shutil.copy(other / name, copy / name)
    with pytest.raises(ValueError, match=rf"metadata count 34 in its episodes, so {says}"):
        all_frames(LeRobotDataset(copy), "observation.images.top")
    rest = LeRobotDataset(copy, skip_bad_episodes=True)
    assert rest.num_episodes == min(len(episodes), 5)  # those whose times say the same as counting
    assert psnr(rest.image(3, "observation.images.top"), episode(0)["observation.images.top"][3]) > 40


def test_rows_that_contradict_the_episodes_are_reported(copy, tmp_path):
    shorter = write(tmp_path / "shorter", [0, 1])
    shutil.copy(shorter / PARQUETS[0], copy / PARQUETS[0])
    with pytest.raises(ValueError, match="has 14 rows, the episodes 34"):
        LeRobotDataset(copy).columns("action")
    info = json.loads((copy / "meta/info.json").read_text())
    (copy / "meta/info.json").write_text(json.dumps(info | {"total_frames": 7}))
    with pytest.raises(ValueError, match=r"counts 7 frames, the episodes in meta/episodes 34"):
        LeRobotDataset(copy)


def test_unknown_names_get_a_suggestion(dataset):
    with pytest.raises(ValueError, match=r"Did you mean 'observation\.images\.top'"):
        all_frames(dataset, "observation.image.top")
    with pytest.raises(ValueError, match="Did you mean 'action'"):
        dataset.columns("actions")
