import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.loss import flow_loss, loss_mask


@pytest.fixture
def pair():
    return jax.random.normal(jax.random.key(0), (2, 3, 4, 5))


def test_without_masks_it_is_the_mean_of_the_squared_error(pair):
    predicted, target = pair
    expected = float(jnp.mean(jnp.square(predicted - target)))
    assert flow_loss(*pair, loss_mask(predicted.shape)) == pytest.approx(expected, rel=1e-6)


def test_masked_entries_change_neither_value_nor_gradient(pair):
    predicted, target = pair
    steps = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    dims = jnp.array([[1, 1, 1, 0, 0]] * 3, bool)
    counted = steps[..., None] & dims[:, None]
    mask = loss_mask(predicted.shape, steps, dims)
    np.testing.assert_array_equal(mask, counted)
    spoiled = jnp.where(counted, target, jnp.inf)
    value, gradient = jax.value_and_grad(flow_loss)(predicted, target, mask)
    other, other_gradient = jax.value_and_grad(flow_loss)(predicted, spoiled, mask)
    assert value == other
    np.testing.assert_array_equal(gradient, other_gradient)
    np.testing.assert_array_equal(gradient[~counted], 0)
    assert value == pytest.approx(float(jnp.mean(jnp.square(predicted - target)[counted])), rel=1e-6)


def test_masks_broadcast_over_draws(pair):
    predicted, target = (jnp.stack([x, x], axis=1) for x in pair)
    steps = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    alone = flow_loss(*pair, loss_mask(pair[0].shape, steps))
    assert flow_loss(predicted, target, loss_mask(predicted.shape, steps[:, None])) == pytest.approx(
        float(alone), rel=1e-6
    )


def test_nothing_counted_gives_zero(pair):
    assert flow_loss(*pair, loss_mask(pair[0].shape, jnp.zeros((3, 4), bool))) == 0


def test_with_the_count_of_the_whole_batch_losses_of_its_parts_add_up(pair):
    predicted, target = pair
    mask = loss_mask(predicted.shape, jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool))
    count = jnp.sum(mask)
    pieces = [flow_loss(predicted[i], target[i], mask[i], count) for i in range(3)]
    assert sum(map(float, pieces)) == pytest.approx(float(flow_loss(predicted, target, mask)), rel=1e-6)
