"""Names of features, as openpi's, LeRobot's and other people's datasets have them."""

import pytest

from pi0_jax.data.names import dimension_names, last_word, recognise
from pi0_jax.data.robots import get_robot

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
