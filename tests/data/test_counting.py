"""Frame k of an episode is the k-th of its frames in the file, whatever the times say; they say it once."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0_jax.data.lerobot import LeRobotDataset
from tests.data.conftest import LENGTHS, all_frames, episode, write
from tests.data.formats import CAMERAS, write_v2, write_video

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
TRUTH = {camera: np.concatenate([episode(n)[camera] for n in range(5)]) for camera in CAMERAS}


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset.root, tmp_path / "copy")


def change(path, column, function):
    table = pq.read_table(path)
    values = function(np.asarray(table[column].to_numpy(), np.float64))
    new = pa.array(values, table.schema.field(column).type)
    pq.write_table(table.set_column(table.column_names.index(column), column, new), path)


def wrong_frames(root) -> int:
    """Rows whose picture looks more like another row's of the same episode."""
    dataset, wrong = LeRobotDataset(root), 0
    for camera in CAMERAS:
        seen = all_frames(dataset, camera).astype(float)
        for first, end in (dataset.episode_range(e) for e in range(5)):
            error = np.square(seen[first:end, None] - TRUTH[camera][None, first:end]).mean((2, 3, 4))
            wrong += int((error.argmin(1) != np.arange(end - first)).sum())
    return wrong


TIMES = {
    "drift": (EPISODES, f"videos/{CAMERAS[0]}/from_timestamp", lambda x: x + 0.17 * np.arange(5), "from_timestamp is"),
    "wall clock": (DATA, "timestamp", lambda x: x + 1.7e9, "timestamps run from 17"),
    "jitter": (DATA, "timestamp", lambda x: x + np.linspace(0, 0.19, len(x)), None),
    "another rate": (DATA, "timestamp", lambda x: x * 30 / 29.3, None),
    "uneven": (DATA, "timestamp", lambda x: np.sort(np.random.default_rng(0).uniform(0, 3, len(x))), "timestamps run"),
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_that_are_off_change_no_frame_and_are_said_once(copy, kind, caplog):
    file, column, function, said = TIMES[kind]
    change(copy / file, column, function)
    assert wrong_frames(copy) == 0
    assert sum("Frames are counted" in record.message for record in caplog.records) <= 1
    if said is not None:
        dataset = LeRobotDataset(copy)
        for camera in CAMERAS:
            dataset.images(camera, np.arange(34)[::-1])
        assert said in caplog.text


def test_a_video_of_another_rate_is_counted_too(tmp_path, caplog):
    root = write_v2(tmp_path / "data")
    for number in range(len(LENGTHS)):
        path = root / f"videos/chunk-{number // 2:03d}/{CAMERAS[0]}/episode_{number:06d}.mp4"
        write_video(path, episode(number)[CAMERAS[0]], fps=7)
    assert wrong_frames(root) == 0
    assert "the video has 7.000 frames per second, and the dataset 5" in caplog.text


def test_right_times_say_nothing(dataset, caplog):
    assert wrong_frames(dataset.root) == 0
    assert "Frames are counted" not in caplog.text


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": 250, "bf": 3}),
        ("libx264", {"g": 250, "bf": 0}),
        ("libsvtav1", {"g": 30, "preset": 10, "crf": 30}),
        ("mjpeg", {}),
    ],
)
def test_codecs_and_distant_key_frames(tmp_path, codec, options):
    root = write_v2(tmp_path / "data", codec=codec, **options)
    assert wrong_frames(root) == 0


def test_files_of_one_dataset_count_on_their_own(tmp_path):
    assert wrong_frames(write(tmp_path / "split", video_file_mb=0.03)) == 0
