"""Diffusion with the exact prediction for Gaussian data gives that Gaussian back, and its two predictions agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.diffusion import clean, cosine_schedule, denoise, diffuse

MEAN, DEVIATION = jnp.array([[0.8, -0.5]]), jnp.array([[0.3, 1.2]])
PREDICTIONS = ("epsilon", "v")


def exact(prediction: str):
    """What the best network predicts for data N(MEAN, DEVIATION²): the posterior mean of its target."""

    def predict(x, time):
        alpha, sigma = cosine_schedule(time)
        variance = alpha**2 * DEVIATION**2 + sigma**2
        epsilon = sigma * (x - alpha * MEAN) / variance
        actions = MEAN + alpha * DEVIATION**2 * (x - alpha * MEAN) / variance
        return epsilon if prediction == "epsilon" else alpha * epsilon - sigma * actions

    return predict


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (4096, 1, 2))


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample(noise, prediction, num_steps, keys=None):
    return denoise(exact(prediction), noise, num_steps, prediction, keys=keys, clip=100.0)


def test_the_schedule_keeps_variance_and_runs_from_data_to_noise():
    alpha, sigma = cosine_schedule(jnp.linspace(0, 1, 50))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    assert (np.diff(alpha) < 0).all()
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert 0 < alpha[-1] <= 1e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_at_a_noisy_point_means_the_actions(prediction):
    actions, noise = jax.random.normal(jax.random.key(0), (2, 1, 4, 5))
    for time in (0.05, 0.5, 0.9):
        x, target = diffuse(actions, noise, jnp.full(1, time), prediction)
        np.testing.assert_allclose(clean(target, x, jnp.float32(time), prediction, 10.0), actions, atol=1e-5)
        np.testing.assert_allclose(
            clean(target, x, jnp.float32(time), prediction, 0.5), actions.clip(-0.5, 0.5), atol=1e-5
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("ancestral", [False, True], ids=["ddim", "ddpm"])
def test_exact_predictions_give_the_mean_and_the_covariance_of_the_data(noise, prediction, ancestral):
    keys = jax.random.split(jax.random.key(1), len(noise)) if ancestral else None
    samples = np.asarray(sample(noise, prediction, 100, keys))[:, 0]
    np.testing.assert_allclose(samples.mean(0), MEAN[0], atol=0.05)
    np.testing.assert_allclose(np.cov(samples.T), np.diag(DEVIATION[0] ** 2), atol=0.1)


def test_without_keys_nothing_is_random_and_it_is_ddims_map_from_noise_to_data(noise):
    # The deterministic map of a Gaussian is affine and keeps order.
    np.testing.assert_allclose(sample(noise, "v", 100), MEAN + DEVIATION * noise, atol=0.15)
    np.testing.assert_array_equal(sample(noise, "v", 100), sample(noise, "v", 100))


def test_both_predictions_take_the_same_way(noise):
    np.testing.assert_allclose(sample(noise, "epsilon", 10), sample(noise, "v", 10), atol=1e-2)


def test_keys_decide_what_is_added_and_each_chunk_has_its_own(noise):
    few, keys = noise[:3], jax.random.split(jax.random.key(1), 3)
    first = sample(few, "v", 10, keys)
    np.testing.assert_array_equal(first, sample(few, "v", 10, keys))
    assert np.abs(first - sample(few, "v", 10)).min() > 0
    other = sample(few, "v", 10, keys.at[0].set(jax.random.key(9)))
    assert np.abs(first - other)[0].min() > 0
    np.testing.assert_allclose(other[1:], first[1:], atol=1e-6)


def test_the_path_starts_at_noise_and_ends_at_the_result(noise):
    end, points = denoise(exact("v"), noise[:3], 5, "v", path=True)
    assert points.shape == (6, 3, 1, 2)
    np.testing.assert_array_equal(points[0], noise[:3])
    np.testing.assert_array_equal(points[-1], end)


def test_actions_are_cut_to_what_is_usual(noise):
    def wild(x, time):
        return jnp.full_like(x, 50.0)

    assert float(jnp.abs(denoise(wild, noise[:3], 5, "epsilon", clip=2.0)).max()) <= 2.0


def test_fewer_than_one_step_is_refused(noise):
    with pytest.raises(ValueError, match="at least 1 step"):
        denoise(exact("v"), noise, 0, "v")
