"""LeRobot's own class loads what the recorder and `pi0 data convert` write, and reads the same numbers and pictures.

LeRobot wants another Python than most: PI0_LEROBOT_PYTHON names the interpreter of an environment that has it.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.lerobot.merge import convert
from pi0_jax.data.rlds.reader import RldsDataset
from pi0_jax.data.source import Renamed
from tests.data.formats import RLDS_KEYS, write_rlds, write_v2

PYTHON = os.environ.get("PI0_LEROBOT_PYTHON")
HORIZON = 4
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="LeRobot is not given: set PI0_LEROBOT_PYTHON to a Python with lerobot[dataset]>=0.6"
)


def record(root: Path) -> None:
    pytest.importorskip("mujoco", reason="the simulator is not installed: pip install -e '.[sim]'")
    from pi0_jax.evaluate.record import Source, record

    record(root, Source("tabletop"), num_episodes=4, workers=1)


def from_v21(root: Path) -> None:
    convert(LeRobotDataset(write_v2(root.parent / "v21")), root, "tabletop", workers=1, episodes_per_piece=2)


def from_rlds(root: Path) -> None:
    pytest.importorskip("tensorflow_datasets", reason="RLDS cannot be read: pip install -e '.[rlds]'")
    source = Renamed(RldsDataset(write_rlds(root.parent / "rlds"), fps=5), RLDS_KEYS)
    convert(source, root, "tabletop", workers=1, episodes_per_piece=2)


MAKERS = {"recorded": record, "converted_from_2.1": from_v21, "converted_from_rlds": from_rlds}


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> dict[str, tuple[LeRobotDataset, dict[str, np.ndarray]]]:
    """For each way to make a dataset: it, and the columns that LeRobot reads."""
    folder = tmp_path_factory.mktemp("itself")
    arguments = []
    for name, make in MAKERS.items():
        (folder / name).mkdir()
        make(folder / name / "data")
        arguments += [str(folder / name / "data"), str(folder / f"{name}.npz")]
    script = Path(__file__).with_name("read_with_lerobot.py")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [str(PYTHON), str(script), str(HORIZON), *arguments], capture_output=True, text=True, env=offline, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (LeRobotDataset(folder / name / "data"), dict(np.load(folder / f"{name}.npz"))) for name in MAKERS}


@pytest.mark.parametrize("name", MAKERS)
def test_lerobot_reads_the_same_numbers_chunks_and_instructions(read, name):
    ours, theirs = read[name]
    frames = np.arange(ours.num_frames)
    assert len(theirs["index"]) == ours.num_frames
    np.testing.assert_array_equal(theirs["index"], frames)
    np.testing.assert_array_equal(theirs["episode_index"], ours.episode_of(frames))
    np.testing.assert_array_equal(theirs["observation.state"], ours.columns("observation.state"))
    actions, inside = ours.chunk(frames, HORIZON)
    np.testing.assert_array_equal(theirs["action"], actions)
    np.testing.assert_array_equal(theirs["action_is_pad"], ~inside)
    assert theirs["task"].tolist() == [ours.task(i) for i in range(ours.num_frames)]


@pytest.mark.parametrize("name", MAKERS)
def test_lerobot_reads_the_same_pictures(read, name):
    ours, theirs = read[name]
    for camera in ours.cameras:
        expected = ours.images(camera, np.arange(ours.num_frames)).astype(int)
        np.testing.assert_array_equal(theirs[camera], expected)
        # torchcodec converts colours by its own FFmpeg, which rounds otherwise.
        assert np.abs(theirs[f"default/{camera}"] - expected).max() <= 3
