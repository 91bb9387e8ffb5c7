"""Meta-World, in whatever interpreter has it."""

import numpy as np
import pytest

from pi0_jax.data.robots import get_robot
from pi0_jax.errors import UserError
from pi0_jax.evaluate.demonstrate import Noise
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.evaluate.simulators.metaworld import MT10, SENTENCES
from tests.evaluate.simulators.opened import opened


@pytest.fixture(scope="module")
def metaworld():
    yield from opened("metaworld", {"tasks": "drawer-close,reach", "image_size": 48})


def test_the_suites_have_their_tasks_and_others_are_refused():
    assert len(SENTENCES) == 50
    assert len(get_simulator("metaworld", tasks="mt50").tasks) == 50
    assert get_simulator("metaworld").tasks == MT10
    assert set(MT10) < set(SENTENCES)
    assert get_simulator("metaworld").per_task == 50
    with pytest.raises(UserError, match=r"tasks has 'raech'; expected mt10, .* Did you mean 'reach'"):
        get_simulator("metaworld", tasks="reach,raech")


def test_an_episode_obeys_its_seed_and_shows_what_lerobot_shows(metaworld):
    robot = get_robot("metaworld")
    seen = []
    for index in (0, 0, 2):  # twice the same layout, and another one of the same task
        episode = metaworld.start(index, 0)
        seen.append(episode.observe())
        episode.close()
    one, same, other = seen
    assert one["images"]["base_0_rgb"].shape == (48, 48, 3)
    assert one["state"].shape == (len(robot.state),)
    assert one["prompt"] == "Push and close a drawer"
    np.testing.assert_array_equal(one["images"]["base_0_rgb"], same["images"]["base_0_rgb"])
    assert (one["images"]["base_0_rgb"] != other["images"]["base_0_rgb"]).any()
    image = one["images"]["base_0_rgb"].astype(float)
    # Upright: the red arm's base is at the upper left, wood below.
    red = (image[..., 0] > 2 * image[..., 1] + 20) & (image[..., 0] > 2 * image[..., 2] + 20)
    rows, columns = np.nonzero(red)
    assert rows.mean() < 24
    assert columns.mean() < 24


def test_the_shipped_expert_is_recorded(metaworld):
    (found,) = metaworld.demonstrations(1, 0, "train", Noise(0.0), get_robot("metaworld").cameras)
    assert found.task == "drawer-close"
    assert found.frames["action"].dtype == np.float32
    assert np.abs(found.frames["action"]).max() <= 1
    assert 10 < len(found.frames["action"]) < 500
