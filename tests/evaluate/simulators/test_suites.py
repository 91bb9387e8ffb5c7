"""Published suites: PushT, ALOHA and LIBERO, in whatever interpreters have them."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pi0_jax.data.robots import get_robot
from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.evaluate.simulators.libero import LIMITS, REST, axis_angle
from tests.evaluate.simulators.opened import opened

STILL = {"libero": REST}


@pytest.fixture(scope="module", params=["pusht", "aloha", "libero"])
def suite(request):
    yield from opened(request.param, {})


def test_a_suite_shows_its_robots_observation_and_obeys_its_seed(suite):
    robot, seen = get_robot(suite.robot), []
    for index in (0, 0, len(suite.tasks)):  # the last one is another layout of the same task
        episode = suite.start(index, 0)
        raw = episode.observe()
        assert set(raw["images"]) == set(robot.cameras.values())
        assert {image.shape for image in raw["images"].values()} == {(*robot.image_size, 3)}
        assert (raw["state"].shape, raw["state"].dtype) == ((len(robot.state),), np.float32)
        over, success = episode.step(np.asarray(STILL.get(suite.name, raw["state"]), np.float32))
        assert not over
        assert not success
        seen.append([*raw["images"].values(), episode.observe()["state"]])
        episode.close()
    for one, same in zip(seen[0], seen[1], strict=True):
        np.testing.assert_allclose(one, same, atol=1e-6)
    assert any((one != other).any() for one, other in zip(seen[0], seen[2], strict=True))


def test_suites_refuse_tasks_that_they_lack():
    with pytest.raises(UserError, match=r"tasks has \['fold'\]; expected some of transfer_cube, insertion"):
        get_simulator("aloha", tasks="insertion,fold")
    with pytest.raises(UserError, match=r"suite is 'long'.*the suites are spatial, object, goal, 10, 90"):
        get_simulator("libero", suite="long")
    assert LIMITS["openpi"]["spatial"] == 220
    assert LIMITS["lerobot"]["spatial"] == 280


def test_rotation_vectors_are_those_of_their_quaternions():
    for quaternion in Rotation.random(20, random_state=0).as_quat():
        vector = axis_angle(quaternion)
        np.testing.assert_allclose(
            Rotation.from_rotvec(vector).as_matrix(), Rotation.from_quat(quaternion).as_matrix(), atol=1e-9
        )
        assert np.linalg.norm(vector) == pytest.approx(2 * np.arccos(quaternion[3]))  # more than π for negative w
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0.0, 0.0, 1.0])), np.zeros(3))
