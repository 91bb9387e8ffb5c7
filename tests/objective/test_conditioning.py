"""Observations as conditions: what is dropped, and what couplings see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import example_observation
from pi0_jax.config import ConditionDropout, Gaussian, OptimalTransport, Sinkhorn
from pi0_jax.objective.conditioning import condition_features, coupled_noise, drop, without
from tests.conftest import tiny_config
from tests.objective.setting import Setting


@pytest.fixture(scope="module")
def setting():
    return Setting(Gaussian(), head=tiny_config().head)


def test_conditions_are_dropped_as_often_as_said_and_never_two_kinds():
    model = tiny_config(vision=dataclasses.replace(tiny_config().vision, image_size=8))
    observation = example_observation(model, 4000)
    config = ConditionDropout(prompt=0.1, images=0.2, both=0.3)
    dropped = jax.jit(lambda o, draw: drop(o, draw, config))(
        observation, jax.random.uniform(jax.random.key(0), (4000,))
    )
    prompt = ~np.asarray(dropped.prompt_mask)
    images = ~np.stack(list(dropped.image_masks.values()), axis=1)
    for mask in (prompt, images):
        np.testing.assert_array_equal(mask.all(1), mask.any(1))
    prompt, images = prompt[:, 0], images[:, 0]
    shares = [np.mean(prompt & ~images), np.mean(images & ~prompt), np.mean(prompt & images)]
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3], atol=0.03)
    np.testing.assert_array_equal(dropped.prompt, observation.prompt)


def test_without_masks_the_examples_it_is_told_and_no_others(setting):
    where = jnp.array([True, False, True])
    masked = without(setting.observation, "both", where)
    np.testing.assert_array_equal(masked.prompt_mask.any(1), ~where)
    np.testing.assert_array_equal(masked.prompt_mask[1], setting.observation.prompt_mask[1])
    np.testing.assert_array_equal(masked.image_masks["top"], ~where)
    assert without(setting.observation, "images").prompt_mask is setting.observation.prompt_mask
    assert without(setting.observation, "prompt").image_masks is setting.observation.image_masks


@pytest.mark.parametrize("coupling", [OptimalTransport, Sinkhorn])
def test_a_coupling_reorders_each_draw_and_another_prompt_costs(setting, coupling):
    rng = np.random.default_rng(0)
    # Two pairs of equal observations.
    observation = jax.tree.map(lambda x: x[jnp.array([0, 0, 1, 1])], setting.observation)
    noise = jnp.asarray(rng.normal(size=(4, 2, 1, 1)), jnp.float32)
    actions = jnp.asarray(rng.normal(size=(4, 1, 1)), jnp.float32)
    paired = np.asarray(
        jax.jit(lambda *args: coupled_noise(coupling(1e4), *args))(noise, actions, observation, jax.random.key(0))
    )
    for draw in range(2):
        for pair in (slice(0, 2), slice(2, 4)):
            assert set(paired[pair, draw].ravel()) <= set(np.asarray(noise)[pair, draw].ravel())
            if coupling is OptimalTransport:
                np.testing.assert_array_equal(
                    np.argsort(paired[pair, draw].ravel()), np.argsort(np.asarray(actions)[pair].ravel())
                )


def test_features_tell_observations_apart_and_not_what_is_masked(setting):
    observation = jax.tree.map(lambda x: x[:1], setting.observation)
    features = jax.jit(condition_features)
    here = features(observation)

    def distance(**changes):
        return float(jnp.sum(jnp.square(features(observation._replace(**changes)) - here)))

    assert distance() == 0
    assert distance(prompt=observation.prompt.at[0, 0].set(63)) >= 1
    assert distance(prompt=observation.prompt.at[0, -1].set(63)) == 0  # padding
    assert distance(state=observation.state + 1) >= 1
    assert distance(images={name: image + 1 for name, image in observation.images.items()}) >= 1
    masks = {name: jnp.zeros(1, bool) for name in observation.images}
    assert distance(image_masks=masks) == pytest.approx(
        float(jnp.sum(jnp.square(here)) - jnp.sum(jnp.square(features(observation._replace(image_masks=masks))))),
        rel=1e-4,
    )
