"""Public datasets as people have them: what is missing is said once, and what is there trains."""

import numpy as np
import pytest

from pi0_jax.config import DataConfig, DatasetConfig, PolicyConfig
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.mixture import open_dataset, open_source
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.errors import UserError
from tests.data.formats import write_v2


def test_a_partial_download_is_named_once_with_counts(real_data, monkeypatch):
    dataset = LeRobotDataset(real_data / "humanoid_v21")
    with pytest.raises(
        FileNotFoundError, match=r"lacks 97 of 100 data files.*98 of 100 videos.*the 2 episodes"
    ) as raised:
        dataset.check_files(["observation.images.cam_high"])
    assert str(raised.value).count("episode_000000") == 2  # an example of each kind
    monkeypatch.setattr("pi0_jax.data.mixture.keep_frames", lambda source, *_: source)
    data, policy = DataConfig(str(dataset.root), validation_share=0.1), PolicyConfig(robot="ur5")
    with pytest.raises(FileNotFoundError, match=r"lacks 97 of 100 data files.*--data\.skip-bad-episodes"):
        open_dataset(DatasetConfig(str(dataset.root)), data, policy)


def test_what_is_there_of_a_partial_download_is_read(real_data):
    root = real_data / "humanoid_v21"
    before = sorted(root.rglob("*"))
    dataset = LeRobotDataset(root, skip_bad_episodes=True)
    assert dataset.episodes == ["episode 1", "episode 2"]
    assert len(dataset.skipped) == 98
    assert len(dataset.skipped_lines()) == 2
    rows = np.array([0, 1, dataset.num_frames - 1])
    assert dataset.images("observation.images.cam_high", rows).shape == (3, 480, 640, 3)
    assert sorted(root.rglob("*")) == before


def test_missing_videos_are_named_once_each_and_columns_are_read(real_data):
    dataset = LeRobotDataset(real_data / "so101_v3_without_videos")
    assert dataset.columns("action").shape == (1492, 6)
    with pytest.raises(FileNotFoundError, match=r"front.*of 4 episodes.*top.*of 4 episodes\. Get the rest\."):
        dataset.check_files(list(dataset.cameras))


def test_git_lfs_pointers_are_called_so(real_data):
    with pytest.raises(UserError, match=r"pointer of Git LFS.*git lfs pull"):
        LeRobotDataset(real_data / "lfs_pointers_v21")


def test_rlds_without_its_preset_is_recognised(real_data):
    pytest.importorskip("tensorflow_datasets")
    robot = Robot("mine", {"observation.images.image_0": "base_0_rgb"}, ("x",) * 7, ("x",) * 7, 5, (64, 64))
    source = open_source(DatasetConfig(str(real_data / "bridge_dataset")), DataConfig(), robot)
    assert source.columns("observation.state").shape[1] == 7
    assert source.image(0, "observation.images.image_0").shape == (64, 64, 3)


def test_bridge_is_read_by_its_robot_without_a_word(real_data):
    pytest.importorskip("tensorflow_datasets")
    source = open_source(DatasetConfig(str(real_data / "bridge_dataset")), DataConfig(), get_robot("bridge"))
    assert (source.num_episodes, source.fps) == (25, get_robot("bridge").fps)
    # All has_image_N are 0. The pictures of the first three cameras are there, and those of the fourth are blank.
    rlds = open_source(DatasetConfig(source.root.as_posix(), fps=5), DataConfig(), get_robot("bridge"))
    masks = [rlds.camera_mask(f"observation/image_{i}") for i in (1, 2, 3)]
    assert [mask.all() for mask in masks] == [True, True, False]
    assert source.camera_mask("observation.images.image_0").all()
    assert not masks[2].any()


def test_episodes_without_an_instruction_are_named_or_given_one(tmp_path, caplog):
    root = write_v2(tmp_path / "data")
    tasks = root / "meta/tasks.jsonl"
    text = tasks.read_text()
    tasks.write_text(text.replace("reach the red block", " "))
    robot = get_robot("tabletop")
    policy = PolicyConfig(robot="tabletop")
    assert open_dataset(DatasetConfig(str(root)), DataConfig(), policy).training.tolist() == [1, 3, 4]
    assert caplog.text.count("2 of 5 episodes have no instruction: episode 0, episode 2") == 1
    assert open_dataset(DatasetConfig(str(root), prompt=""), DataConfig(), policy).training.tolist() == [0, 1, 2, 3, 4]
    tasks.write_text(tasks.read_text().replace("push the blue ball", "").replace("reach the puck", ""))
    with pytest.raises(UserError, match=r"no episode .* has an instruction.*prompt=''"):
        open_dataset(DatasetConfig(str(root)), DataConfig(), policy)
    tasks.write_text(text.replace("reach the red block", " "))
    source = open_source(DatasetConfig(str(root), prompt="do something"), DataConfig(), robot)
    assert source.task(0) == "do something"
    assert source.task(source.episode_range(1)[0]) == "push the blue ball"
