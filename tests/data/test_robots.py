"""Robots: found by name or file, each one's example is a valid observation, and actions come back as they went in."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest

from pi0_jax.config import ModelConfig, PolicyConfig, VisionConfig
from pi0_jax.data import robots
from pi0_jax.data.normalization import Normalization, NormStats
from pi0_jax.data.observation import check_observation
from pi0_jax.data.robots import ROBOTS, SEMANTICS, get_robot, semantics_of
from pi0_jax.data.robots.aloha import angle_from_command, angle_from_opening, command_from_angle, opening_from_angle
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import adapt, chain, make_transform, relative_actions
from pi0_jax.errors import UserError

FILE = """
from pi0_jax.data.robots import Robot
ROBOT = Robot("mine", {"observation.images.a": "base_0_rgb"}, ("j",), ("j",), None, (8, 8), semantics=("angle",))
"""


def test_tabletop_names_its_planar_axes():
    robot = get_robot("tabletop")
    assert robot.planar is not None
    for pairs, names in ((robot.planar.state, robot.state), (robot.planar.actions, robot.actions)):
        assert all((names[x][-1], names[y][-1]) == ("x", "y") for x, y in pairs)


def test_unknown_robot_gets_a_suggestion_and_a_missing_one_the_list():
    with pytest.raises(UserError, match="Did you mean 'tabletop'"):
        get_robot("table_top")
    with pytest.raises(UserError, match=r"names no robot.*aloha, aloha_sim, bridge, droid.*pi0 data robot PATH"):
        get_robot("")


@pytest.mark.parametrize("name", ROBOTS)
def test_every_robot_is_consistent_and_its_example_is_valid(name):
    robot = get_robot(name)
    assert robot.name == name
    check_observation(robot.example(), robot)
    assert pickle.loads(pickle.dumps(robot)).cameras == robot.cameras  # worker processes get it
    assert set(semantics_of(robot, {})) <= set(SEMANTICS)
    assert all(camera in ModelConfig().cameras for camera in robot.cameras.values()) or name == "tabletop"


@pytest.mark.parametrize("name", ROBOTS)
def test_actions_of_every_robot_come_back_through_the_whole_chain(name):
    robot, random = get_robot(name), np.random.default_rng(0)
    model = ModelConfig(
        vision=VisionConfig(image_size=16), cameras=tuple(robot.cameras.values()), action_horizon=5, vocab_size=512
    )
    dims = {"state": len(robot.state), "actions": len(robot.actions)}
    stats = {key: NormStats(random.normal(size=d), random.uniform(0.5, 2, d)) for key, d in dims.items()}
    tokenizer = Tokenizer.train(["do nothing"], 512)
    transform = make_transform(
        PolicyConfig(model=model, robot=name), robot, Normalization(stats, semantics_of(robot, {})), tokenizer
    )
    state = random.uniform(0.1, 0.9, dims["state"]).astype(np.float32)
    actions = random.uniform(0.1, 0.9, (5, dims["actions"])).astype(np.float32)
    sample = transform.forward(robot.example() | {"state": state, "actions": actions})
    assert sample["actions"].shape == (5, 32)
    back = transform.inverse({key: sample[key] for key in ("actions", "anchor") if key in sample})
    np.testing.assert_allclose(back["actions"], actions, atol=1e-5)


def test_relative_actions_are_differences_to_the_state_where_the_robot_says_so():
    transform = relative_actions(("relative", "gripper", "absolute", "angle"))
    state = np.array([1.0, 2.0, 3.0, 3.0])
    actions = np.array([[1.5, 0.7, 9.0, -3.0], [0.0, 0.0, 0.0, 3.2]])
    sample = transform.forward({"state": state, "actions": actions})
    expected = [[0.5, 0.7, 9.0, 2 * np.pi - 6], [-1.0, 0.0, 0.0, 0.2]]
    np.testing.assert_allclose(sample["actions"], expected)
    back = transform.inverse({"actions": sample["actions"], "anchor": sample["anchor"]})["actions"]
    np.testing.assert_allclose(back[:, :3], actions[:, :3])
    np.testing.assert_allclose(np.exp(1j * back[:, 3]), np.exp(1j * actions[:, 3]))  # the same angle, the short way
    assert (np.abs(back[:, 3] - state[3]) <= np.pi).all()
    with pytest.raises(ValueError, match="anchor"):
        transform.inverse({"actions": actions})


def test_the_anchor_is_the_true_state_even_where_normalisation_holds_it_constant():
    robot = dataclasses.replace(get_robot("ur5"), semantics=("relative",) * 7)
    model = ModelConfig(vision=VisionConfig(image_size=16), action_horizon=1, vocab_size=512)
    constant = NormStats(*(np.full(7, value) for value in (1.0, 0.0, 1.0, 1.0, 1.0, 1.0)))
    moving = NormStats(np.zeros(7), np.ones(7))
    transform = make_transform(
        PolicyConfig(model=model, robot="ur5"),
        robot,
        Normalization({"state": constant, "actions": moving}, semantics_of(robot, {})),
        Tokenizer.train(["do nothing"], 512),
    )
    sample = transform.forward(robot.example() | {"state": np.full(7, 5.0, np.float32)})
    back = transform.inverse({"actions": np.zeros((1, 32)), "anchor": sample["anchor"]})
    np.testing.assert_allclose(back["actions"], 5.0)


def test_aloha_turns_joints_and_measures_grippers_as_the_weights_do():
    robot = get_robot("aloha")
    closed, opened = angle_from_opening(np.array([0.0, 1.0]))
    # By hand: (0.022² + 0.01844² - 0.036²) / (2 · 0.022 · 0.01844) = -0.5816, whose arcsine is -0.6207 rad.
    assert closed == pytest.approx((-0.6207 - 0.5476) / (1.6296 - 0.5476), abs=1e-3)
    assert opened == pytest.approx((np.pi / 2 - 0.5476) / 1.082)  # there the sine would be above 1, and is cut
    x = np.linspace(0, 0.9, 7)
    np.testing.assert_allclose(opening_from_angle(angle_from_opening(x)), x, atol=1e-12)
    np.testing.assert_allclose(command_from_angle(angle_from_command(x)), x, atol=1e-12)
    assert angle_from_command(np.array(1.0)) == pytest.approx(2.1123 - 0.6213 - 0.5476)
    sample = adapt(robot).forward({"state": np.full(14, 0.3), "actions": np.full((2, 14), 0.3)})
    for values in (sample["state"], sample["actions"][0]):
        assert np.flatnonzero(values[[0, 1, 2, 3, 7, 8, 9, 10]] < 0).tolist() == [1, 2, 5, 6]
    assert semantics_of(robot, {}) == (*["relative"] * 6, "gripper") * 2
    both = chain(adapt(robot), relative_actions(semantics_of(robot, {})))
    state, actions = np.full(14, 0.4), np.full((2, 14), 0.3)
    forward = both.forward({"state": state, "actions": actions})
    np.testing.assert_allclose(forward["actions"][0, [0, 1]], [-0.1, 0.1])
    np.testing.assert_allclose(both.inverse(forward)["actions"], actions)


def test_droid_commands_positions_and_the_released_weights_velocities():
    assert semantics_of(get_robot("droid"), {}) == (*["relative"] * 7, "gripper")
    assert semantics_of(get_robot("droid_velocity"), {}) == (*["absolute"] * 7, "gripper")


def test_semantics_can_be_set_and_are_checked():
    robot = get_robot("droid")
    assert semantics_of(robot, {"droid": ("absolute",) * 8}) == ("absolute",) * 8
    with pytest.raises(ValueError, match="8 actions, and semantics for 2"):
        semantics_of(robot, {"droid": ("absolute",) * 2})
    with pytest.raises(ValueError, match=r"semantics \['delta'\]"):
        semantics_of(robot, {"droid": ("delta",) * 8})
    with pytest.raises(ValueError, match="relative to state 4, and there are only 4"):
        semantics_of(dataclasses.replace(robot, state=("a",) * 4), {})


def test_a_robot_can_be_a_file(tmp_path):
    path = tmp_path / "mine.py"
    with pytest.raises(FileNotFoundError, match=r"docs/your_robot\.md"):
        get_robot(str(path))
    path.write_text(FILE)
    assert get_robot(str(path)).semantics == ("angle",)
    path.write_text("robot = 3")
    with pytest.raises(ValueError, match="sets no `ROBOT`"):
        get_robot(str(path))


def test_a_new_file_in_the_folder_is_a_new_robot():
    folder = Path(robots.__file__).parent
    assert {*ROBOTS, "__init__"} == {path.stem for path in folder.glob("*.py")}
