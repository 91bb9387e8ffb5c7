"""The reference datasets: the same episodes in several formats read the same."""

import sys

import numpy as np
import pytest

from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.source import Renamed
from tests.data.conftest import all_frames


@pytest.fixture(scope="module")
def versions(fixtures):
    return [LeRobotDataset(fixtures / name) for name in ("lerobot_v3_tiny", "lerobot_v21_tiny")]


def test_lerobot_3_and_2_give_identical_numbers_and_tasks(versions):
    new, old = versions
    for name in ("observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index"):
        np.testing.assert_array_equal(new.columns(name), old.columns(name))
    assert new.tasks == old.tasks
    assert (new.fps, new.num_episodes, new.num_frames, new.cameras) == (20, 5, 250, old.cameras)


def test_lerobot_3_and_2_give_the_same_frames_within_codec_error(versions):
    """28 dB between AV1 at crf 30 and H.264, and a frame beside is further away wherever the picture moved enough."""
    for camera in versions[0].cameras:
        a, b = (all_frames(dataset, camera).astype(float) for dataset in versions)
        error = np.square(a - b).mean((1, 2, 3))
        assert 10 * np.log10(255**2 / error.mean()) > 28
        for mine, beside in ((slice(0, -1), slice(1, None)), (slice(1, None), slice(0, -1))):
            further = np.square(a[mine] - b[beside]).mean((1, 2, 3)) > error[mine]
            moved = np.square(b[1:] - b[:-1]).mean((1, 2, 3)) > 30
            assert moved.sum() > 20
            assert further[moved].mean() > 0.97


def test_random_access_gives_the_frames_of_decoding_in_order(versions, fixtures):
    rows = np.random.default_rng(0).permutation(250)[:60]
    for dataset in versions:
        random = LeRobotDataset(dataset.root)  # with a decoder of its own
        for camera in dataset.cameras:
            np.testing.assert_array_equal(random.images(camera, rows), all_frames(dataset, camera)[rows])


def test_rlds_gives_identical_steps_in_both_file_formats_without_tensorflow(fixtures, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from pi0_jax.data.rlds.reader import RldsDataset

    records, arrays = (
        RldsDataset(fixtures / "rlds_tiny" / form / "tiny_rlds", 20) for form in ("tfrecord", "array_record")
    )
    rows = np.random.default_rng(0).permutation(250)
    assert (records.num_frames, records.num_episodes, records.tasks) == (250, 5, arrays.tasks)
    for name in records.features:
        if name in records.cameras:
            np.testing.assert_array_equal(records.images(name, rows), arrays.images(name, rows))
        else:
            np.testing.assert_array_equal(records.columns(name), arrays.columns(name))
    assert "tensorflow" not in sys.modules


def test_every_frame_of_video_is_nearest_to_its_own_picture(fixtures, versions, tmp_path):
    """RLDS stores the same frames as JPEG, nearer to the truth. The videos are coarse (crf 30, every second frame is
    predicted from the one before), so where little moves a frame comes out as a copy of the one before, never later."""
    pytest.importorskip("tensorflow_datasets")
    from pi0_jax.data.rlds.reader import RldsDataset

    rlds = RldsDataset(fixtures / "rlds_tiny/tfrecord/tiny_rlds", 20)
    rlds = Renamed(rlds, {"observation.state": "observation/state"})
    certain = 0
    for lerobot in versions:
        number = {key: i for i, key in enumerate(lerobot.episode_keys())}
        for mine, key in enumerate(rlds.episode_keys()):
            a, b = np.arange(*rlds.episode_range(mine)), np.arange(*lerobot.episode_range(number[key]))
            assert rlds.task(a[0]) == lerobot.task(b[0])
            for ours, theirs in (("image", "front"), ("wrist_image", "wrist")):
                truth = rlds.images(f"observation/{ours}", a).astype(np.float32).reshape(len(a), -1)
                decoded = lerobot.images(f"observation.images.{theirs}", b).astype(np.float32).reshape(len(b), -1)
                distance = np.square(truth).sum(1) - 2 * decoded @ truth.T
                offset = distance.argmin(1) - np.arange(len(a))
                assert set(offset) <= {0, -1}
                jump = np.square(np.diff(truth, axis=0)).mean(1)
                moves = np.minimum(np.pad(jump, (1, 0), mode="edge"), np.pad(jump, (0, 1), mode="edge")) > 80
                assert (offset[moves] == 0).all()
                certain += moves.sum()
    assert certain > 200
