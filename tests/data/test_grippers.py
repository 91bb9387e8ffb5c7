"""Grippers: ranges are shown; other units or an inverted one are seen where the robot declares its own."""

import dataclasses

import numpy as np
import pytest

from pi0_jax.data.robots import Grippers, check_robot, get_robot
from pi0_jax.data.tools.grippers import _usual, check_grippers
from pi0_jax.errors import UserError
from tests.data.test_check import opened, record

OPEN = np.repeat([1.0, 0.0, 1.0, 0.3], 15)
"""Opening of a gripper in the frames of an episode: it grasps twice, the second time something thick."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return opened(record(tmp_path_factory.mktemp("grippers") / "data"))


@pytest.fixture
def check(recorded, monkeypatch):
    """Problems and notes of an SO-101's dataset with these gripper values, by its declaration of 100 open, 0 closed."""

    def check(state, action=None, robot=recorded.robot):
        columns = {}
        for name, values in (("observation.state", state), ("action", state if action is None else action)):
            columns[name] = recorded.source.columns(name).copy()
            columns[name][:, 5] = np.tile(values, 4)
        monkeypatch.setattr(recorded.source, "columns", columns.__getitem__)
        return check_grippers(recorded._replace(robot=robot))

    return check


def test_a_gripper_as_declared_is_shown(check):
    problems, notes = check(100 * OPEN)
    assert problems == []
    assert notes == [
        f"{key} gripper.pos is from 0 to 100 (a range of 0 to 100); so101's is 100 open, 0 closed, so that 0% of the "
        "episodes begin with it closed"
        for key in ("state", "actions")
    ]


@pytest.mark.parametrize(("values", "shown"), [(OPEN, "0 to 1"), (2 * OPEN - 1, "-1 to 1")])
def test_other_units_are_a_problem(check, values, shown):
    problems, _ = check(values)
    assert len(problems) == 2
    assert f"(a range of {shown}), and so101's is 100 open, 0 closed" in problems[0]


def test_values_far_beyond_the_declared_range_are_a_problem(check):
    problems, _ = check(700 * OPEN)
    assert "state gripper.pos is from 0 to 700, and so101's" in problems[0]


def test_one_that_is_inverted_is_seen_by_the_other(check):
    problems, _ = check(100 * OPEN, 100 - 100 * OPEN)
    (found,) = problems
    assert "the state opens, by the `grippers` of so101, where the actions close (correlation -1.00)" in found


def test_both_inverted_are_to_be_seen_by_how_episodes_begin(check):
    problems, notes = check(100 - 100 * OPEN)
    assert problems == []
    assert all(note.endswith("100% of the episodes begin with it closed") for note in notes)


def test_without_a_declaration_nothing_is_a_problem(check):
    robot = dataclasses.replace(get_robot("so101"), grippers=Grippers())
    problems, notes = check(OPEN, 1 - OPEN, robot)
    assert problems == []
    assert "state gripper.pos is from 0 to 1 (a range of 0 to 1), at the beginning of most episodes 1" in notes
    assert any("one is inverted" in note for note in notes)


@pytest.mark.parametrize(
    ("ends", "name"),
    [((0, 1), "0 to 1"), ((0.02, 0.9), "0 to 1"), ((1.5, 98), "0 to 100"), ((-1, 1), "-1 to 1"), ((0, 0.04), None)],
)
def test_usual_ranges(ends, name):
    assert _usual(*map(float, ends)) == name


def test_grippers_that_a_robot_has_not_are_refused():
    robot = dataclasses.replace(get_robot("so101"), grippers=Grippers(actions={"hand": (0.0, 1.0)}))
    with pytest.raises(UserError, match=r"no actions \['hand'\] that could be grippers"):
        check_robot(robot)
