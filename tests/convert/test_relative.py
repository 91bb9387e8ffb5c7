"""Relative actions in LeRobot's folders: enabled where its rule by names gives ours, and a warning where it cannot."""

import dataclasses
import json

import numpy as np
import pytest

from pi0_jax.convert.formats import open_checkpoint, write_checkpoint
from pi0_jax.convert.relative import relative_actions
from pi0_jax.convert.run import convert
from pi0_jax.data.robot_json import robot_to_json
from pi0_jax.data.robots import get_robot
from pi0_jax.data.transform import relative_actions as transform
from tests.convert.common import STATS, tiny_weights

FILE = """
from pi0_jax.data.robots import Adapter, Pose, Poses, Robot

ROBOT = Robot("mine", {{"front": "base_0_rgb"}}, {state}, {actions}, 10, (8, 8), semantics={kinds}{more})
"""


def trained(path, actions=("joint", "gripper"), kinds=("relative", "gripper"), state=None, more="", stats=STATS):
    """A policy of a robot's file, as training leaves it."""
    path.write_text(FILE.format(state=state or actions, actions=actions, kinds=kinds, more=more))
    weights = tiny_weights("pi05")
    policy = dataclasses.replace(weights.policy, robot=str(path))
    kept = stats | {"action_semantics": {"mine": list(kinds)}}
    return weights._replace(policy=policy, norm_stats=kept, robot=robot_to_json(str(path)))


def steps(folder) -> dict[str, dict]:
    names = ("policy_preprocessor.json", "policy_postprocessor.json")
    found = [step for name in names for step in json.loads((folder / name).read_text())["steps"]]
    return {step["registry_name"]: step["config"] for step in found}


def by_lerobots_rule(config: dict, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
    """What `to_absolute_actions` of LeRobot 0.6 does with the mask that it makes of the configuration."""
    words = [word.lower() for word in config["exclude_joints"]]
    mask = [not any(word in name.lower() for word in words) for name in config["action_names"]]
    return actions + np.array(mask) * state[: len(mask)]


def test_lerobot_is_told_which_actions_are_relative(tmp_path):
    write_checkpoint(trained(tmp_path / "mine.py"), tmp_path / "run/checkpoints/3", "pi0")
    (tmp_path / "mine.py").unlink()  # the checkpoint has it
    convert(tmp_path / "run", tmp_path / "out", "lerobot")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["use_relative_actions"] is True
    assert config["relative_exclude_joints"] == ["gripper"]
    assert config["action_feature_names"] == ["joint", "gripper"]
    processors = steps(tmp_path / "out")
    relative = processors["relative_actions_processor"]
    assert relative == {"enabled": True, "exclude_joints": ["gripper"], "action_names": ["joint", "gripper"]}
    assert processors["absolute_actions_processor"] == {"enabled": True}
    chunk, state = np.array([[0.1, 0.5], [0.2, 1.0]]), np.array([3.0, 9.0])
    ours = transform(("relative", "gripper")).inverse({"actions": chunk, "anchor": state})["actions"]
    np.testing.assert_allclose(by_lerobots_rule(relative, chunk, state), ours)
    text = (tmp_path / "out/README.md").read_text()
    assert "| robot | mine |" in text
    assert "LeRobot's `absolute_actions_processor` adds it back" in text
    assert open_checkpoint(tmp_path / "out").norm_stats["action_semantics"] == {"mine": ["relative", "gripper"]}


def test_a_name_within_another_is_told_apart(tmp_path):
    found = relative_actions(trained(tmp_path / "mine.py", ("wrist", "wrist_gripper"), ("gripper", "relative")))
    assert (found.names, found.excluded) == (["000_wrist", "001_wrist_gripper"], ("000_wrist",))
    everything = relative_actions(trained(tmp_path / "mine.py", ("a", "b"), ("relative", "angle")))
    assert (everything.count, everything.names, everything.excluded) == (2, ["a", "b"], ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": ("joint",)}, "fewer states than actions"),
        (
            {
                "actions": tuple("xyzabc"),
                "kinds": ("relative",) * 6,
                "more": ", poses=Poses((Pose(0, 'euler_xyz'),), (Pose(0, 'euler_xyz'),))",
            },
            "poses are relative in SE",
        ),
    ],
)
def test_what_lerobot_cannot_add_is_said(tmp_path, changes, reason, caplog):
    weights = trained(tmp_path / "mine.py", **changes)
    found = relative_actions(weights)
    assert found.names is None
    assert reason in found.reason
    write_checkpoint(weights, tmp_path / "out", "lerobot")
    assert steps(tmp_path / "out")["relative_actions_processor"]["enabled"] is False
    assert "use_relative_actions" not in json.loads((tmp_path / "out/config.json").read_text())


def test_conversions_of_units_are_said_to_be_lost(tmp_path, caplog):
    adapted = ", adapt=Adapter(*[lambda x: 2 * x, lambda x: x / 2] * 2)"
    write_checkpoint(trained(tmp_path / "mine.py", more=adapted), tmp_path / "run", "pi0")
    convert(tmp_path / "run", tmp_path / "out", "lerobot")
    assert "the robot's `adapt` converts units, which LeRobot does not" in caplog.text


def test_a_built_in_robot_needs_no_file(tmp_path):
    weights = tiny_weights("pi05")
    found = relative_actions(weights._replace(policy=dataclasses.replace(weights.policy, robot="droid")))
    assert (found.count, found.excluded) == (7, ("gripper",))
    assert found.names == list(get_robot("droid").actions)
