"""A policy that is told what is left of the chunk in execution."""

import dataclasses

import jax
import numpy as np
import pytest

from pi0_jax.config import Gaussian, RealTimeConfig
from pi0_jax.inference.policy import Policy
from pi0_jax.sampler import Euler
from tests.policies import TINY, save_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that learned to go on from two actions, and whose actions are relative to the state."""
    objective = Gaussian(max_delay=2)
    policy = dataclasses.replace(TINY, objective=objective, action_semantics={"tabletop": ("relative",) * 3})
    return save_tiny_checkpoint(tmp_path_factory.mktemp("run"), policy=policy)


@pytest.fixture(scope="module")
def trained(folder):
    return Policy.load(folder, real_time=RealTimeConfig(method="trained"))


@pytest.fixture
def observation(trained):
    rng = np.random.default_rng(0)
    example = trained.robot.example()
    images = {name: rng.integers(0, 256, image.shape, np.uint8) for name, image in example["images"].items()}
    return example | {"images": images, "state": rng.normal(size=6).astype(np.float32) / 10}


LEFT = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32) / 50


def test_what_is_certain_comes_back_in_the_robots_units_wherever_the_robot_is_now(trained, observation):
    for moved in (0.0, 0.3):
        told = {"state": observation["state"] + np.float32(moved), "previous": LEFT, "delay": 2}
        chunk = trained.infer(observation | told)
        np.testing.assert_allclose(chunk[:2], LEFT[:2], atol=1e-6)
        assert np.abs(chunk[2:4] - LEFT[2:]).max() > 1e-3
        # One cannot be told of more than was learned.
        np.testing.assert_array_equal(trained.infer(observation | told | {"delay": 4}), chunk)


def test_guidance_draws_a_chunk_towards_the_rest(folder, observation):
    policy = Policy.load(folder, sampler=Euler(10))
    miss = [
        np.abs(policy.infer(observation | told)[:4] - LEFT).mean()
        for told in ({}, {"previous": LEFT, "delay": 1}, {"previous": LEFT, "delay": 4})
    ]
    assert miss[0] > 2 * miss[1] > 2 * miss[2]
    assert miss[0] > 4 * miss[2]


def test_a_batch_may_hold_both_kinds_and_one_program_serves_every_rest_and_delay(folder, observation):
    policy, keys = Policy.load(folder), jax.random.split(jax.random.key(0), 3)
    told = [observation, observation | {"previous": LEFT, "delay": 1}, observation | {"previous": LEFT[:0]}]
    chunks = policy.infer_batch(told, keys)
    for i in (0, 2):
        np.testing.assert_allclose(chunks[i], policy.infer_batch([observation], keys[i : i + 1])[0], atol=1e-6)
    np.testing.assert_allclose(chunks[1], policy.infer_batch(told[1:2], keys[1:2])[0], atol=1e-6)
    before = policy.compiled
    for rest, delay in ((LEFT[:1], 0), (LEFT, 3), (np.repeat(LEFT, 3, axis=0), 9)):
        policy.infer(observation | {"previous": rest, "delay": delay})
    assert policy.compiled == before


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"previous": LEFT[:, :2]}, r"`previous` has shape \(4, 2\); expected \(steps, 3\): dx, dy, dz"),
        ({"previous": LEFT * np.nan}, "`previous` is NaN"),
        ({"previous": LEFT, "delay": -1}, "`delay` is -1"),
        ({"previous": "all"}, "is no number"),
    ],
)
def test_a_rest_that_is_none_is_refused(trained, observation, told, message):
    with pytest.raises(ValueError, match=message):
        trained.infer(observation | told)
