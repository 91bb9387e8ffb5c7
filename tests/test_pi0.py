import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import Batch
from pi0_jax.config import FlowConfig
from pi0_jax.model.velocity import VelocityNetwork
from pi0_jax.pi0 import example_inputs, init_params, loss, scale_images
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def setting():
    """A tiny network, its parameters, and a batch."""
    config = tiny_config()
    network = VelocityNetwork(config)
    params = jax.jit(lambda key: nn.meta.unbox(init_params(network, key)))(jax.random.key(0))
    observation, x, _ = example_inputs(config, 3)
    actions = jax.random.normal(jax.random.key(1), x.shape)
    step_mask = jnp.arange(config.action_horizon) < jnp.array([[6], [2], [4]])
    dim_mask = jnp.tile(jnp.arange(config.action_dim) < 3, (3, 1))
    return network, params, Batch(observation, actions, step_mask, dim_mask)


def value(setting, key: int, flow: FlowConfig, **changes) -> float:
    network, params, batch = setting
    run = jax.jit(functools.partial(loss, network, flow=flow))
    return float(run(params, batch._replace(**changes), jax.random.key(key))[0])


def test_the_loss_depends_on_the_draws_and_counts_what_the_masks_say(setting):
    flow = FlowConfig(samples_per_observation=2, mask_padded_dims=True)
    batch = setting[2]
    assert value(setting, 0, flow) != value(setting, 1, flow)
    unmasked = dataclasses.replace(flow, mask_padded_steps=False, mask_padded_dims=False)
    assert value(setting, 0, unmasked) != value(setting, 0, flow)
    assert value(setting, 0, flow, step_mask=jnp.zeros_like(batch.step_mask)) == 0


def test_the_mean_draw_needs_no_randomness(setting):
    flow = FlowConfig(samples_per_observation=1, mean_draw=True)
    assert value(setting, 0, flow) == value(setting, 1, flow)
    more = dataclasses.replace(flow, samples_per_observation=3)
    assert value(setting, 0, more) != value(setting, 1, more)


def test_the_mean_draw_is_the_error_of_the_predicted_mean(setting):
    network, params, batch = setting
    zeros = jnp.zeros_like(batch.actions)
    predicted = network.apply({"params": params}, scale_images(batch.observation), zeros, jnp.ones(3))
    error = jnp.square(predicted + batch.actions)[batch.step_mask]
    flow = FlowConfig(samples_per_observation=1, mean_draw=True)
    assert value(setting, 0, flow) == pytest.approx(float(error.mean()), rel=1e-4)


def test_uint8_images_are_scaled_and_float_images_kept(setting):
    observation = setting[2].observation
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    scaled = scale_images(observation._replace(images={"top": pixels, "tool": observation.images["tool"]}))
    np.testing.assert_allclose(scaled.images["top"].ravel(), [-1, -0.6, 1], atol=1e-6)
    np.testing.assert_array_equal(scaled.images["tool"], observation.images["tool"])
