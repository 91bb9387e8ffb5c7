"""Every frame is its own, in any order, codec, size and rate; what has to be turned, and depth, is refused by name."""

import json
import struct

import av
import numpy as np
import pytest

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data import video
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.lerobot.merge import convert
from pi0_jax.data.mixture import open_source
from pi0_jax.data.names import is_depth
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.data.tools.robot import describe_robot
from pi0_jax.data.video import FrameReader, VideoError
from tests.data.conftest import LENGTHS, episode, scene
from tests.data.formats import CAMERAS, write_v2, write_video
from tests.data.test_lerobot_versions import own_frame_is_nearest

HEVC = {"x265-params": "keyint=8:log-level=none"}
CODECS = {
    "h264 with B-frames": ("libx264", "yuv420p", {"g": 12, "bf": 3}),
    "h264, one key frame": ("libx264", "yuv420p", {"g": 250}),
    "h264, 10 bit": ("libx264", "yuv420p10le", {"g": 6}),
    "hevc": ("libx265", "yuv420p", HEVC),
    "hevc, 10 bit": ("libx265", "yuv420p10le", HEVC),
    "av1": ("libsvtav1", "yuv420p", {"g": 2, "preset": 10, "crf": 30}),
    "av1, 10 bit, distant key frames": ("libsvtav1", "yuv420p10le", {"g": 30, "preset": 10, "crf": 30}),
    "mjpeg": ("mjpeg", "yuvj420p", {}),
    "mjpeg, odd size": ("mjpeg", "yuvj420p", {}),
    "h264, odd size": ("libx264", "yuv444p", {"g": 6}),
    "hevc, odd size": ("libx265", "yuv444p", HEVC),
    "mpeg4, odd size": ("mpeg4", "yuv420p", {"g": 6}),
}
ODD = (95, 127)


def moving(length: int = 24, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Frames of a bright square that moves by a few pixels each, over a table; `[n, h, w, 3]`."""
    images = np.stack([scene(7, max(size))[: size[0], : size[1]]] * length)
    for i, image in enumerate(images):
        x, y = (3 * i) % (size[1] - 16), 16 * (3 * i // (size[1] - 16))
        image[y : y + 16, x : x + 16] = (250, 240, 40)
    return images


def check(path, truth: np.ndarray) -> None:
    """Frames in random order and in order are those that were written, and in their colours."""
    reader, order = FrameReader(), np.random.default_rng(0).permutation(len(truth))
    out = np.zeros_like(truth)
    for part in np.array_split(order, 6):
        reader.read(path, part, out, part)
    assert own_frame_is_nearest(out, truth)
    assert np.abs(out.astype(float) - truth).mean() < 8
    once = np.zeros_like(truth)
    FrameReader().read(path, np.arange(len(truth)), once, np.arange(len(truth)))
    np.testing.assert_array_equal(out, once)


@pytest.mark.parametrize("codec", CODECS)
def test_every_frame_is_its_own_in_any_order_and_codec(tmp_path, codec):
    encoder, pix_fmt, options = CODECS[codec]
    truth = moving(size=ODD if "odd" in codec else (64, 64))
    write_video(tmp_path / "a.mp4", truth, encoder, fps=20, pix_fmt=pix_fmt, **options)
    check(tmp_path / "a.mp4", truth)
    by_table, by_packets = video._listed_by_container(tmp_path / "a.mp4"), video._listed_by_packets(tmp_path / "a.mp4")
    if codec == "av1":
        assert by_table is not None or not hasattr(av.stream.Stream, "index_entries")
    for a, b in zip(by_table or by_packets, by_packets, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bf", [0, 3])
def test_frames_of_variable_rate_are_counted(tmp_path, bf):
    truth = moving()
    times = np.cumsum(np.random.default_rng(0).integers(900, 9000, len(truth))).tolist()
    write_video(tmp_path / "a.mp4", truth, fps=20, times=times, g=8, bf=bf)
    shown = FrameReader().seconds(tmp_path / "a.mp4") * 90000
    np.testing.assert_allclose(shown, np.array(times) - times[0], atol=100)  # it is what it says it is
    check(tmp_path / "a.mp4", truth)


@pytest.mark.parametrize(("bf", "cut"), [(0, 3), (0, 10), (2, 5)])
def test_frames_that_were_cut_off_without_encoding_again_do_not_count(tmp_path, bf, cut):
    """As `ffmpeg -ss 0.5 -c copy` does it: the frames stay, and an edit list says where to begin."""
    truth = moving()
    write_video(tmp_path / "a.mp4", truth, fps=20, g=8, bf=bf)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"elst") + 12
    duration, start = struct.unpack_from(">Ii", content, at)
    struct.pack_into(">Ii", content, at, duration - 50 * cut, start + 512 * cut)
    (tmp_path / "a.mp4").write_bytes(content)
    check(tmp_path / "a.mp4", truth[cut:])


UPRIGHT = (1, 0, 0, 0, 1, 0, 0, 0)
TURNED = {
    "turned by 90": (0, 1, 0, -1, 0, 0, 0, 0),
    "turned by 180": (-1, 0, 0, 0, -1, 0, 0, 0),
    "turned by 270": (0, -1, 0, 1, 0, 0, 0, 0),
    "mirrored": (1, 0, 0, 0, -1, 0, 0, 0),
}


def set_matrix(path, matrix) -> None:
    """Writes the matrix by which players show a track into the header of an MP4 file."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", content, start) == (*(x << 16 for x in UPRIGHT), 1 << 30)
    struct.pack_into(">8i", content, start, *(x << 16 for x in matrix))
    path.write_bytes(content)


@pytest.mark.parametrize("kind", TURNED)
def test_a_file_that_is_to_be_turned_is_refused_with_what_to_do(tmp_path, kind):
    truth = moving(4)
    write_video(tmp_path / "a.mp4", truth, fps=20)
    set_matrix(tmp_path / "a.mp4", UPRIGHT)
    FrameReader().read(tmp_path / "a.mp4", np.arange(4), np.zeros_like(truth), np.arange(4))
    set_matrix(tmp_path / "a.mp4", TURNED[kind])
    with pytest.raises(VideoError, match=rf"a\.mp4 asks to be shown {kind}.*ffmpeg -i"):
        FrameReader().read(tmp_path / "a.mp4", np.array([2]), np.zeros_like(truth), np.array([2]))


def test_frames_at_random_come_from_one_generator_of_packets(tmp_path):
    """PyAV 18 keeps some 250 bytes of each that is left unfinished: 20 MB in 10,000 batches of 8 frames."""
    truth = moving()
    write_video(tmp_path / "a.mp4", truth, fps=20)
    reader, made = FrameReader(), []
    video = reader._open(tmp_path / "a.mp4")

    class Counted:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            made.extend([name] * (name in ("demux", "decode")))
            return getattr(self.container, name)

    video._container = Counted(video._container)
    out = np.zeros_like(truth)
    for number in range(0, 24, 3):
        reader.read(tmp_path / "a.mp4", np.array([number]), out, np.array([number]))
    assert made == []


# Depth.


@pytest.fixture
def with_depth(tmp_path):
    """A dataset whose second camera is depth, stored in 16 bits without loss."""
    root = write_v2(tmp_path / "data")
    for number, length in enumerate(LENGTHS):
        path = root / f"videos/chunk-{number // 2:03d}/{CAMERAS[1]}/episode_{number:06d}.mp4"
        write_video(path, depth(number, length), "ffv1", pix_fmt="gray16le")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][CAMERAS[1]] |= {"shape": [48, 48, 1], "info": {"video.is_depth_map": True}}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def depth(number: int, length: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 2**16, (length, 48, 48), np.uint16)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"video.is_depth_map": True}, True),
        ({"is_depth_map": True}, True),
        ({"video.pix_fmt": "gray16le", "video.is_depth_map": False}, True),
        ({"video.pix_fmt": "gray12le"}, True),
        ({"video.pix_fmt": "gray"}, False),
        ({"video.pix_fmt": "yuv420p10le", "is_depth_map": False}, False),
        (None, False),
    ],
)
def test_depth_is_known_by_what_is_said_of_the_video(info, expected):
    assert is_depth({"dtype": "video", "info": info}) is expected


def test_depth_is_no_camera_unless_keys_say_so(with_depth):
    robot = get_robot("tabletop")
    with pytest.raises(
        ValueError, match=rf"{CAMERAS[1]} of .* is a depth stream.*leave it out of the cameras of table"
    ):
        open_source(DatasetConfig(str(with_depth)), DataConfig(), robot)
    mapped = open_source(DatasetConfig(str(with_depth), keys={CAMERAS[1]: CAMERAS[1]}), DataConfig(), robot)
    truth = np.concatenate([depth(number, length) for number, length in enumerate(LENGTHS)]) >> 8
    grey = mapped.images(CAMERAS[1], np.arange(34))
    assert np.abs(grey.astype(int) - truth[..., None]).max() <= 1
    colours = mapped.images(CAMERAS[0], np.array([3]))
    assert np.abs(colours.astype(int) - episode(0)[CAMERAS[0]][3]).mean() < 8


def test_depth_is_not_recognised_under_another_name(with_depth):
    robot = Robot("mine", {"observation.tool": "base_0_rgb"}, ("x",) * 6, ("x",) * 3, 5, (48, 48))
    source = open_source(DatasetConfig(str(with_depth)), DataConfig(), robot)
    with pytest.raises(ValueError, match=r"has no camera 'observation\.tool'"):
        source.images("observation.tool", np.array([0]))


def test_depth_is_left_out_of_a_robots_file_and_of_conversions(with_depth, tmp_path):
    text = describe_robot(str(with_depth), "mine")
    assert f'# "{CAMERAS[1]}" is left out: it is depth.' in text
    assert f'"{CAMERAS[0]}": "base_0_rgb"' in text
    convert(LeRobotDataset(with_depth), tmp_path / "out", "mine", workers=1)
    assert LeRobotDataset(tmp_path / "out").cameras == (CAMERAS[0],)
