"""Frames that are kept: the same pictures, each decoded about once, within a bound, and never a damaged one."""

import pickle

import numpy as np
import pytest

from pi0_jax.data.files import cache_folder
from pi0_jax.data.frames import KeptFrames, keep_frames
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.transform import resize_with_pad
from pi0_jax.data.video import FrameReader
from tests.data.conftest import all_frames, write
from tests.data.formats import CAMERAS, write_v2

SIZE = 24


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> LeRobotDataset:
    """One key frame per episode."""
    return LeRobotDataset(write_v2(tmp_path_factory.mktemp("sparse") / "data", g=250, bf=0, sc_threshold=0))


@pytest.fixture
def kept(sparse, tmp_path) -> KeptFrames:
    return KeptFrames(sparse, CAMERAS, SIZE, tmp_path, sparse.num_frames)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Numbers of the frames that are decoded from now on."""
    numbers, read = [], FrameReader.read

    def counted(self, path, wanted, out, at):
        numbers.extend(np.asarray(wanted).tolist())
        read(self, path, wanted, out, at)

    monkeypatch.setattr(FrameReader, "read", counted)
    return numbers


def test_pictures_are_those_of_the_model_and_each_is_decoded_once(sparse, kept, decoded):
    truth = {camera: resize_with_pad(all_frames(sparse, camera), SIZE) for camera in CAMERAS}
    decoded.clear()
    for epoch in range(3):
        rows = np.random.default_rng(epoch).permutation(34).reshape(17, 2)
        for camera in CAMERAS:
            np.testing.assert_array_equal(kept.images(camera, rows), truth[camera][rows])
    assert len(decoded) == 2 * 34


def test_another_process_finds_them(sparse, kept, decoded):
    first = kept.images(CAMERAS[0], np.arange(34))
    decoded.clear()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept)).images(CAMERAS[0], np.arange(34)), first)
    assert not decoded


def test_a_damaged_frame_is_decoded_again(kept, decoded, tmp_path):
    first = kept.images(CAMERAS[0], np.arange(34))
    (pixels,) = tmp_path.glob(f"{CAMERAS[0]}-*/pixels")
    content = bytearray(pixels.read_bytes())
    content[3 * SIZE**2 * 5 + 7] ^= 1
    pixels.write_bytes(content)
    decoded.clear()
    np.testing.assert_array_equal(kept.images(CAMERAS[0], np.array([5, 4])), first[[5, 4]])
    assert 5 in decoded


def test_no_more_is_kept_than_there_is_room_for(sparse, tmp_path, decoded):
    kept = KeptFrames(sparse, CAMERAS, SIZE, tmp_path, 10)
    first = kept.images(CAMERAS[0], np.arange(34))
    (pixels,) = tmp_path.glob(f"{CAMERAS[0]}-*/pixels")
    assert pixels.stat().st_size == 10 * 3 * SIZE**2
    decoded.clear()
    np.testing.assert_array_equal(kept.images(CAMERAS[0], np.arange(10)), first[:10])
    assert not decoded
    np.testing.assert_array_equal(kept.images(CAMERAS[0], np.array([30])), first[[30]])
    assert len(decoded) == 1  # and not the others of its key frame, which would be thrown away


def test_a_full_disk_is_said_and_training_goes_on(sparse, kept, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    truth = resize_with_pad(all_frames(sparse, CAMERAS[0]), SIZE)
    np.testing.assert_array_equal(kept.images(CAMERAS[0], np.arange(34)), truth)
    assert caplog.text.count("no more frames are kept") == 1


def test_changed_video_is_not_mixed_with_what_was_kept(sparse, tmp_path):
    root = write_v2(tmp_path / "data", g=250, bf=0, sc_threshold=0)
    before = KeptFrames(LeRobotDataset(root), CAMERAS, SIZE, tmp_path / "kept", 34).images(CAMERAS[0], np.arange(9))
    names = [root / f"videos/chunk-000/{camera}/episode_000000.mp4" for camera in CAMERAS]
    names[0].write_bytes(names[1].read_bytes())
    after = KeptFrames(LeRobotDataset(root), CAMERAS, SIZE, tmp_path / "kept", 34).images(CAMERAS[0], np.arange(9))
    assert np.abs(before.astype(int) - after).mean() > 5
    assert len(list((tmp_path / "kept").glob(f"{CAMERAS[0]}-*"))) == 1


def test_only_videos_with_few_key_frames_are_kept_and_the_log_says_what_it_takes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pi0_jax.data.frames.SPARSE", 5)
    caplog.set_level("INFO")
    dense = LeRobotDataset(write(tmp_path / "dense"))
    assert dense.key_distance(CAMERAS[0]) < 3
    assert keep_frames(dense, CAMERAS, SIZE, 1.0) is dense
    sparse = LeRobotDataset(write_v2(tmp_path / "sparse", g=250, bf=0, sc_threshold=0))
    kept = keep_frames(sparse, CAMERAS, SIZE, 1.0)
    assert isinstance(kept, KeptFrames)
    assert "are 9 frames apart, so decoded frames are kept at 24 px" in caplog.text
    assert str(cache_folder(sparse.root, None)) in caplog.text
    assert kept.features[CAMERAS[0]]["shape"] == (SIZE, SIZE, 3)


def test_the_cache_is_elsewhere_where_the_users_cannot_be_written_to(tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    monkeypatch.setenv("PI0_CACHE", str(taken))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert (tmp_path / "temporary") in cache_folder(tmp_path / "data", None).parents
    with pytest.raises(ValueError, match="Set PI0_CACHE"):
        cache_folder(tmp_path / "data", taken / "chosen")


def test_the_users_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.delenv("PI0_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(tmp_path / "data", None).is_relative_to(tmp_path / "pi0_jax/datasets")
