"""A dataset of the hub, from a cache of the hub's layout, without a connection."""

import dataclasses
import runpy
import shutil
from pathlib import Path

import pytest

from pi0_jax import cli
from pi0_jax.config import DataConfig
from pi0_jax.data.files import find_dataset
from pi0_jax.data.mixture import open_datasets
from pi0_jax.data.robots import get_robot
from pi0_jax.training.inputs import load_inputs
from pi0_jax.training.resolve import resolve

constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch, dataset) -> Path:
    """The snapshot of `owner/arm` in a cache as the hub's client lays it out; HF_HUB_OFFLINE was set at the start."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub/datasets--owner--arm"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    blobs, snapshot = folder / "blobs", folder / "snapshots" / COMMIT
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in dataset.root.rglob("*") if path.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(dataset.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    return snapshot


@pytest.mark.parametrize("flags", [[], ["--offline"]])
def test_a_robot_is_described_and_its_data_opened_from_the_cache(cached, tmp_path, config, flags, capsys):
    robot = tmp_path / "arm.py"
    assert cli.main(["data", "robot", "hf://owner/arm", "--output", str(robot), *flags]) == 0
    assert f"--data.path hf://owner/arm --policy.robot {robot}" in capsys.readouterr().out
    assert runpy.run_path(str(robot))["ROBOT"].name == "tabletop"
    cameras = tuple(get_robot(str(robot)).cameras.values())

    model = dataclasses.replace(config.policy.model, cameras=cameras)
    policy = dataclasses.replace(config.policy, robot=str(robot), model=model)
    data = DataConfig("hf://owner/arm", offline=bool(flags))
    inputs = load_inputs(resolve(dataclasses.replace(config, policy=policy, data=data, batch_size=8)))
    batch = next(iter(inputs.loader))
    assert batch.actions.shape[0] == 8
    assert "action_semantics" in inputs.assets.norm_stats
    (opened,) = open_datasets(data, policy)
    assert (opened.source.root, opened.source.num_episodes) == (cached, 5)


def test_what_is_not_in_the_cache_is_named_with_the_way_to_it(cached, capsys):
    assert cli.main(["data", "robot", "hf://owner/other", "--offline"]) == 1
    said = capsys.readouterr().err
    assert "hf://owner/other is not in the hub's cache" in said
    assert "datasets--owner--other" in said
    assert "hf download owner/other --repo-type dataset" in said
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        find_dataset("hf://owner/other")


@pytest.mark.parametrize("name", ["a/b/c", "lerobot", "datasets/arm"])
def test_a_name_that_the_hub_cannot_have_is_named(name):
    with pytest.raises(ValueError, match=rf"hf://{name} names no dataset of the hub; expected hf://owner/name"):
        find_dataset(f"hf://{name}", offline=True)


@pytest.mark.parametrize("url", ["s3://bucket/arm", "gs://bucket/arm"])
def test_a_dataset_in_an_object_store_is_to_be_mounted(url):
    with pytest.raises(ValueError, match=rf"{url} is in an object store.*rclone mount"):
        find_dataset(url)


def test_a_file_that_the_snapshot_lacks_is_named(cached, config):
    (video,) = list(cached.glob("videos/observation.images.top/**/*.mp4"))[:1]
    video.unlink()
    (opened,) = open_datasets(DataConfig("hf://owner/arm", offline=True), config.policy)
    with pytest.raises((FileNotFoundError, ValueError), match=str(video.relative_to(cached))):
        opened.source.image(0, "observation.images.top")
