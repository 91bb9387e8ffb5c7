"""Names of features, as openpi's, LeRobot's and other people's datasets have them."""

import json

import numpy as np
import pytest

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.mixture import open_source
from pi0_jax.data.names import last_word, recognise
from pi0_jax.data.robots import get_robot
from pi0_jax.data.source import dimension_names
from tests.data.test_check import NAMES, record

PICTURE, VECTOR = {"dtype": "image"}, {"dtype": "float32"}


def features(*names: str) -> dict:
    return {name: PICTURE if "image" in name else VECTOR for name in names}


@pytest.mark.parametrize("prefix", ["", "observation/"])
def test_openpis_libero(prefix):
    found = recognise(
        features(f"{prefix}image", f"{prefix}wrist_image", f"{prefix}state", "actions"), get_robot("libero")
    )
    assert found == {
        "observation.images.image": f"{prefix}image",
        "observation.images.image2": f"{prefix}wrist_image",
        "observation.state": f"{prefix}state",
        "action": "actions",
    }


def test_openpis_droid_joins_the_pieces_of_its_state():
    names = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    found = recognise(features(*names, "joint_position", "gripper_position", "actions"), get_robot("droid_velocity"))
    assert found["observation.state"] == "joint_position + gripper_position"
    assert found["observation.images.wrist_left"] == "wrist_image_left"


def test_names_that_are_right_are_left_alone():
    robot = get_robot("aloha")
    assert recognise(features(*robot.cameras, "observation.state", "action"), robot) == {}


def test_a_state_in_several_columns_is_joined_in_order():
    found = recognise(features("observation.state.gripper", "observation.state.arm", "action"), get_robot("so101"))
    assert found == {"observation.state": "observation.state.arm + observation.state.gripper"}


def test_what_may_be_two_things_is_left_to_the_user():
    assert recognise(features("left/state", "right/state", "action"), get_robot("so101")) == {}


@pytest.mark.parametrize("name", ["observation.images.top", "observation/top", "top", "observation.top"])
def test_the_last_word(name):
    assert last_word(name) == "top"


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        [["a", "b"]],
        {"motors": ["a", "b"]},
        {"left": ["a"], "right": ["b"]},
        {"a": 0, "b": 1},
        {"b": 1, "a": 0},
    ],
)
def test_names_of_dimensions_however_they_are_nested(names):
    assert dimension_names({"shape": (2,), "names": names}) == ("a", "b")


@pytest.mark.parametrize("names", [None, [], ["state"], ["a", "a"], {"axes": ["a"]}])
def test_names_that_do_not_fit_are_none(names):
    assert dimension_names({"shape": (2,), "names": names}) is None


def test_dimensions_in_another_order_are_put_into_the_robots(tmp_path, caplog):
    caplog.set_level("INFO")
    right, robot = record(tmp_path / "right"), get_robot("so101")
    order = [1, 0, 5, 2, 3, 4]
    source = open_source(DatasetConfig(str(right)), DataConfig(), robot)
    assert "order" not in caplog.text
    info = json.loads((right / "meta/info.json").read_text())
    older = [f"main_{NAMES[i].removesuffix('.pos')}" for i in order]  # as LeRobot 2 called them
    info["features"]["observation.state"]["names"] = {"motors": older}
    info["features"]["action"]["names"] = older
    (right / "meta/info.json").write_text(json.dumps(info))
    moved = open_source(DatasetConfig(str(right)), DataConfig(), robot)
    for name in ("observation.state", "action"):
        found, there = moved.columns(name), source.columns(name)
        np.testing.assert_array_equal(found[:, order], there)
        np.testing.assert_array_equal(moved.read(name, np.array([1]))[:, order], source.read(name, np.array([1])))
        assert moved.features[name]["names"][:2] == ["main_shoulder_pan", "main_shoulder_lift"]
        assert caplog.text.count(f"{name} is in the order main_shoulder_lift, main_shoulder_pan") == 1
    np.testing.assert_array_equal(moved.chunk(0, 3)[0][:, order], source.chunk(0, 3)[0])


def test_actions_without_names_are_in_the_order_of_the_state(tmp_path, caplog):
    caplog.set_level("INFO")
    root, robot = record(tmp_path / "data"), get_robot("so101")
    straight = open_source(DatasetConfig(str(root)), DataConfig(), robot)
    info = json.loads((root / "meta/info.json").read_text())
    order = [1, 0, 5, 2, 3, 4]
    info["features"]["observation.state"]["names"] = [NAMES[i] for i in order]
    info["features"]["action"]["names"] = None
    (root / "meta/info.json").write_text(json.dumps(info))
    moved = open_source(DatasetConfig(str(root)), DataConfig(), robot)
    for name in ("observation.state", "action"):
        np.testing.assert_array_equal(moved.columns(name)[:, order], straight.columns(name))
    assert "the names of observation.state, as it has none" in caplog.text


def test_other_names_are_said_once_and_taken_as_they_stand(tmp_path, caplog):
    caplog.set_level("INFO")
    root, robot = record(tmp_path / "data", ["pan", *NAMES[1:]]), get_robot("so101")
    source = open_source(DatasetConfig(str(root)), DataConfig(), robot)
    assert (
        caplog.text.count("action has other names than so101, taken as they stand: pan is read as shoulder_pan.pos")
        == 1
    )
    assert type(source).__name__ == "LeRobotDataset"


def test_a_state_in_several_columns_has_their_names():
    whole = {"dtype": "float32", "shape": (2,)}
    assert dimension_names(whole | {"names": [["a"], {"motors": ["b"]}]}) == ("a", "b")
    assert dimension_names(whole | {"shape": (), "names": None}) is None
