"""PushT's expert: its model of a push, its ways round the T, and the whole where gym-pusht is installed."""

import itertools

import numpy as np
import pytest

from pi0_jax.data.robots import get_robot
from pi0_jax.evaluate.demonstrate import Noise
from pi0_jax.evaluate.simulators.pusht.expert import DISC, GOAL, Travel, clearance, corners, error, of_origin, push
from tests.evaluate.simulators.opened import opened

POSE = np.array([256.0, 256.0, 0.0])


def test_a_push_through_the_centre_shifts_and_beside_it_turns():
    discs = np.array([[256.0, 256 - 45 - DISC], [256 + 40, 256 - 45 - DISC], [256 - 40, 256 - 45 - DISC]])
    poses = push(np.tile(POSE, (3, 1)), discs, np.tile([0.0, 1.0], (3, 1)), 20, 1.0)[-1]
    np.testing.assert_allclose(poses[0], [256, 276, 0], atol=0.1)
    assert poses[1, 2] == pytest.approx(-poses[2, 2])
    assert poses[1, 2] > 0.1
    assert (poses[1:, 1] < 276).all()
    gaps = [clearance(np.add(disc, [0, 20]), pose) for disc, pose in zip(discs, poses, strict=True)]
    assert np.min(gaps) > DISC - 0.5


def test_errors_are_distances_to_the_goal():
    assert error(GOAL) == pytest.approx(0)
    assert error(np.add(GOAL, [3, 4, 0])) == pytest.approx(5)
    np.testing.assert_allclose(of_origin(np.array([256, 256, 0.0])), [256, 301, 0])
    assert corners(np.tile(POSE, (4, 1))).shape == (4, 8, 2)


def test_the_way_goes_round_the_t():
    start, end = np.array([256.0, 150.0]), np.array([256.0, 400.0])
    travel = Travel(start, POSE)
    points = [start, *travel.way(end)]
    dense = np.concatenate([np.linspace(a, b, 50) for a, b in itertools.pairwise(points)])
    assert clearance(dense, POSE).min() > DISC
    assert 250 < travel.distance(end[None])[0] < 600


def test_the_expert_brings_the_t_home():
    for simulator in opened("pusht", {}):
        lengths = [
            len(found.frames["action"])
            for found in simulator.demonstrations(2, 0, "train", Noise(0.0), get_robot("pusht").cameras)
        ]
        assert max(lengths) < 300
