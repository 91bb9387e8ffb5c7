"""Folders and files that are no dataset are named for what they are, with what helps."""

import re

import pytest

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.foreign import explain
from pi0_jax.data.hdf5.reader import find_files
from pi0_jax.data.mixture import open_source
from pi0_jax.data.robots import get_robot

KINDS = {
    "HDF5": (["mine/task/episode_0.hdf5"], r"holds task/episode_0\.hdf5.*pi0 data convert \S+/mine mine-v3"),
    "Zarr": (["mine/.zgroup", "mine/data/action/.zarray"], "is a Zarr store.*docs/data.md, Other formats"),
    "Zarr 3": (["mine/zarr.json"], "is a Zarr store"),
    "Zarr inside": (["mine/replay_buffer.zarr/.zgroup"], "holds replay_buffer.zarr, which is a Zarr store"),
    "ROS bag": (["mine/a.bag"], r"holds a\.bag, which is a ROS bag.*Other formats"),
    "ROS 2 bag": (["mine/metadata.yaml", "mine/a_0.db3"], "holds a_0.db3, which is a ROS 2 bag"),
    "MCAP": (["mine/day/a_0.mcap"], r"holds day/a_0\.mcap, which is a ROS 2 bag \(MCAP\)"),
    "LeRobot 1": (["mine/meta_data/info.json", "mine/data/train-0.parquet"], "version 1.*convert_dataset_v1_to_v2"),
    "hub": (["mine/refs/main", "mine/snapshots/old/meta/info.json"], r"hub; did you mean \S*snapshots/old\?"),
    "part of the hub": (["mine/snapshots/abc/README.md"], "without meta/info.json in any version: name hf://mine"),
    "inside": (["mine/owner/name/meta/info.json"], "did you mean .*owner/name"),
    "zip": (["mine/data.zip"], r"holds data\.zip, which is an archive: unpack it with `unzip \S*data\.zip`"),
    "tar": (["mine/data.tar.gz"], r"unpack it with `tar -xf \S*data\.tar\.gz`"),
    "empty meta": (["mine/meta/stats.json"], r"meta/ without info\.json"),
    "records": (["mine/mine-train.tfrecord-00000-of-00001"], r"tfrecord files, and no features\.json"),
    "pictures": (["mine/a.png"], "neither a LeRobot dataset, which has meta/info.json, nor an RLDS one"),
}


def touch(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_named_for_what_it_is(tmp_path, kind):
    names, message = KINDS[kind]
    touch(tmp_path, names)
    with pytest.raises(FileNotFoundError, match=message):
        open_source(DatasetConfig(str(tmp_path / "mine")), DataConfig(), get_robot("so101"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a b.hdf5", r"pi0 data convert '\S*a b\.hdf5' 'a b-v3'"),
        ("a.tar", "is an archive: unpack it with `tar -xf"),
        ("a.mcap", "is a ROS 2 bag"),
        ("a.zarr.zip", "unpack it with `unzip"),
        ("info.json", "is a file; expected the folder of a LeRobot or RLDS dataset"),
    ],
)
def test_a_file_is_named_for_what_it_is(tmp_path, name, message):
    touch(tmp_path, [name])
    with pytest.raises(FileNotFoundError, match=message):
        open_source(DatasetConfig(str(tmp_path / name)), DataConfig(), get_robot("so101"))


def test_of_the_versions_in_the_hubs_cache_the_newest_is_proposed(tmp_path):
    touch(tmp_path, [f"mine/snapshots/{name}/meta/info.json" for name in "abc"] + ["mine/refs/main"])
    (tmp_path / "mine/refs/main").write_text("b\n")
    assert explain(tmp_path / "mine").endswith("snapshots/b?")


def test_a_folder_of_a_dataset_proposes_the_dataset(tmp_path):
    touch(tmp_path, ["mine/meta/info.json", "mine/videos/a.mp4"])
    assert re.search(r"did you mean \S*/mine\?", explain(tmp_path / "mine/videos"))


def test_what_is_not_hdf5_is_named_when_it_should_be_converted(tmp_path):
    touch(tmp_path, ["mine/a.bag"])
    with pytest.raises(FileNotFoundError, match=r"no HDF5 files to convert\. .*a\.bag, which is a ROS bag"):
        find_files(tmp_path / "mine")
