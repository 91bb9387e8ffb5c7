"""A checkpoint keeps its robot: poses and all else as data, and conversions of units by what they do."""

import dataclasses
import json

import pytest

from pi0_jax.data.poses import Pose, Poses
from pi0_jax.data.robot_json import kept_robot, robot_to_json
from pi0_jax.data.robots import ROBOTS, get_robot
from pi0_jax.errors import UserError

FILE = """
import numpy as np
from pi0_jax.data.robots import Adapter, Clients, Grippers, Planar, Pose, Poses, RldsNames, Robot

ROBOT = Robot(
    name="arm",
    cameras={"observation.images.front": "base_0_rgb"},
    state=("x", "y", "z", "rx", "ry", "rz", "gripper"),
    actions=("x", "y", "z", "rx", "ry", "rz", "speed"),
    fps=29.97,
    image_size=(8, 8),
    semantics=(*["relative"] * 6, "absolute"),
    poses=Poses((Pose(0, "axis_angle"),), (Pose(0, "axis_angle"),)),
    grippers=Grippers({"gripper": (0.0, 1.0)}),
    changes=("speed",),
    velocities=("speed",),
    clients=Clients({"front": "base_0_rgb"}, reset_pose=(0.0, 1.0)),
    rlds=RldsNames({"action": "act"}, 5),
    adapt=ADAPT,
)
"""
ADAPT = "Adapter(*[lambda x: SCALE * x, lambda x: x / SCALE] * 2)"


def write(path, scale=None):
    text = FILE.replace("ADAPT", "None" if scale is None else ADAPT.replace("SCALE", str(scale)))
    path.write_text(text)
    return str(path)


def test_a_robot_comes_back_from_its_json_where_its_file_is_gone_or_another(tmp_path):
    name = write(tmp_path / "arm.py")
    robot, kept = get_robot(name), json.loads(json.dumps(robot_to_json(name)))
    assert kept.pop("source") == (tmp_path / "arm.py").read_text()
    (tmp_path / "arm.py").write_text(FILE.replace("ADAPT", "None").replace("axis_angle", "euler_xyz"))
    assert kept_robot(name, kept) == robot
    (tmp_path / "arm.py").unlink()
    found = kept_robot(name, kept)
    assert found == robot
    assert found.poses == Poses((Pose(0, "axis_angle"),), (Pose(0, "axis_angle"),))
    assert found.model_state[3:9] == ("r11", "r21", "r31", "r12", "r22", "r32")


def test_built_in_robots_are_those_of_the_package():
    assert robot_to_json("aloha") is None
    assert kept_robot("aloha", None) is get_robot("aloha")


@pytest.mark.parametrize("name", ROBOTS)
def test_every_robot_can_be_kept(name, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f"from pi0_jax.data.robots.{name} import ROBOT")
    robot = get_robot(name)
    kept = json.loads(json.dumps(robot_to_json(str(path))))
    assert kept_robot(str(path), kept) == robot
    path.unlink()
    if robot.adapt is None:
        assert kept_robot(str(path), kept) == dataclasses.replace(robot)


def test_conversions_are_run_from_the_robots_own_file_alone_and_have_to_be_the_same(tmp_path):
    name = write(tmp_path / "arm.py", 2.0)
    kept = json.loads(json.dumps(robot_to_json(name)))
    write(tmp_path / "arm.py", 2)  # other text, the same conversion
    assert kept_robot(name, kept).adapt.state(3.0) == 6.0
    write(tmp_path / "arm.py", 2.01)
    with pytest.raises(UserError, match=r"`adapt` of \S*arm\.py does not convert units as it did.*assets/robot\.py"):
        kept_robot(name, kept)
    write(tmp_path / "arm.py")
    with pytest.raises(UserError, match="does not convert units as it did"):
        kept_robot(name, kept)
    (tmp_path / "arm.py").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"never run from a checkpoint.*assets/robot\.py.*copy it to \S*arm\.py"
    ):
        kept_robot(name, kept)


def test_a_robot_of_another_version_is_named(tmp_path):
    kept = robot_to_json(write(tmp_path / "arm.py"))
    with pytest.raises(UserError, match=r"robot\.json does not fit this version.*state"):
        kept_robot("arm.py", {key: value for key, value in kept.items() if key != "state"})
