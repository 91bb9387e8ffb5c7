"""Robots: found by name, and each one's own example is a valid observation."""

import pytest

from pi0_jax.data.robots import get_robot
from pi0_jax.data.transform import check_observation


def test_tabletop_is_described_completely():
    robot = get_robot("tabletop")
    check_observation(robot.example(), robot)
    assert robot.planar is not None
    for pairs, names in ((robot.planar.state, robot.state), (robot.planar.actions, robot.actions)):
        assert all((names[x][-1], names[y][-1]) == ("x", "y") for x, y in pairs)


def test_unknown_robot_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'tabletop'"):
        get_robot("table_top")
