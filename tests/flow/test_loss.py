import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.loss import flow_loss, squared_error


@pytest.fixture
def pair():
    return jax.random.normal(jax.random.key(0), (2, 3, 4, 5))


def test_without_masks_it_is_the_mean_of_the_squared_error(pair):
    assert flow_loss(*pair) == pytest.approx(float(jnp.mean(squared_error(*pair))), rel=1e-6)


def test_masked_entries_change_neither_value_nor_gradient(pair):
    predicted, target = pair
    steps = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    dims = jnp.array([[1, 1, 1, 0, 0]] * 3, bool)
    counted = steps[..., None] & dims[:, None]
    spoiled = jnp.where(counted, target, jnp.inf)
    value, gradient = jax.value_and_grad(flow_loss)(predicted, target, steps, dims)
    other, other_gradient = jax.value_and_grad(flow_loss)(predicted, spoiled, steps, dims)
    assert value == other
    np.testing.assert_array_equal(gradient, other_gradient)
    np.testing.assert_array_equal(gradient[~counted], 0)
    assert value == pytest.approx(float(jnp.mean(jnp.square(predicted - target)[counted])), rel=1e-6)


def test_masks_broadcast_over_draws(pair):
    predicted, target = (jnp.stack([x, x], axis=1) for x in pair)
    steps = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    assert flow_loss(predicted, target, steps[:, None]) == pytest.approx(float(flow_loss(*pair, steps)), rel=1e-6)


def test_nothing_counted_gives_zero(pair):
    assert flow_loss(*pair, step_mask=jnp.zeros((3, 4), bool)) == 0
