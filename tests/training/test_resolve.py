"""What a configuration decides before data and weights are read: room for wide robots."""

import dataclasses

import pytest

from pi0_jax.config import PolicyConfig, TrainConfig
from pi0_jax.errors import UserError
from pi0_jax.training.resolve import resolve
from tests.conftest import tiny_config

WIDE = """
from pi0_jax.data.robots import Robot

NAMES = tuple(f"joint_{i}" for i in range(34))
ROBOT = Robot("humanoid", {"observation.images.head": "base_0_rgb"}, NAMES, NAMES, 30, (48, 64))
"""


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    (tmp_path / "humanoid.py").write_text(WIDE)
    model = tiny_config("pi0", cameras=("base_0_rgb",), action_dim=32)
    return TrainConfig(policy=PolicyConfig(robot=str(tmp_path / "humanoid.py"), model=model), batch_size=8)


def test_fresh_weights_get_room_for_a_wide_robot(config):
    found = resolve(config)
    assert found.policy.model.action_dim == found.config.policy.model.action_dim == 34
    assert found.weights["action_in"]["kernel"].value.shape[0] == 34


def test_trained_weights_have_to_be_grown_and_the_error_says_how(config):
    with pytest.raises(UserError, match=r"pi0 convert base wider --action-dim 34"):
        resolve(dataclasses.replace(config, init_from="base"))
