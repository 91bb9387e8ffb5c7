"""Gaussian paths, and the four predictions on them, each of which gives every other one."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_jax.flow.path import Cosine, Predicts, Straight, estimate, interpolate, to_velocity
from tests.flow.toy import posterior

PATHS = {"straight": Straight(), "cosine": Cosine(), "cosine without offset": Cosine(offset=0.0)}
PREDICTS = typing.get_args(Predicts)
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
predictions = pytest.mark.parametrize("predicts", PREDICTS)


@pytest.fixture(scope="module")
def pair():
    """Actions and noise."""
    return jax.random.normal(jax.random.key(0), (2, 3, 4, 5))


def test_the_path_runs_from_data_at_0_to_noise_at_1(pair):
    actions, noise = pair
    np.testing.assert_array_equal(interpolate(Straight(), actions, noise, jnp.zeros(3))[0], actions)
    np.testing.assert_array_equal(interpolate(Straight(), actions, noise, jnp.ones(3))[0], noise)
    np.testing.assert_array_equal(interpolate(Cosine(), actions, noise, jnp.zeros(3))[0], actions)
    np.testing.assert_allclose(interpolate(Cosine(), actions, noise, jnp.ones(3))[0], noise, atol=5e-3)


@paths
def test_the_velocity_is_the_derivative_of_the_path(pair, path):
    time = jnp.array([0.2, 0.5, 0.9])
    _, velocity = interpolate(path, *pair, time)
    _, derivative = jax.jvp(lambda t: interpolate(path, *pair, t)[0], (time,), (jnp.ones(3),))
    np.testing.assert_allclose(velocity, derivative, atol=2e-5)


@pytest.mark.parametrize("path", [Cosine(), Cosine(offset=0.0), Cosine(offset=0.05)])
def test_the_cosine_slopes_are_the_derivatives_of_its_coefficients(path):
    for time in (0.01, 0.3, 0.7, 0.99):
        c = path.at(time)
        np.testing.assert_allclose(c.d_alpha, jax.grad(lambda t: path.at(t).alpha)(time), rtol=1e-4)
        np.testing.assert_allclose(c.d_sigma, jax.grad(lambda t: path.at(t).sigma)(time), rtol=1e-4)


def test_the_cosine_path_keeps_variance_and_runs_from_data_to_noise():
    alpha, sigma, *_ = Cosine().at(jnp.linspace(0, 1, 50))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    assert (np.diff(alpha) < 0).all()
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert 0 < alpha[-1] <= 1e-3


@pytest.mark.parametrize("offset", [0.0, 0.008])
def test_the_cosine_sigma_keeps_its_digits_near_the_data(offset):
    times = np.array([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.3])
    alpha = np.cos((times + offset) / (1 + offset) * np.pi / 2) / np.cos(offset / (1 + offset) * np.pi / 2)
    np.testing.assert_allclose(Cosine(offset).at(jnp.asarray(times)).sigma, np.sqrt(1 - alpha**2), rtol=1e-5)


@paths
def test_every_coefficient_is_finite_at_both_ends(path):
    for time in (0.0, 1.0):
        assert np.isfinite(path.at(time)).all()


@paths
def test_time_may_differ_between_the_actions_of_a_chunk(pair, path):
    actions, noise = pair
    time = jax.random.uniform(jax.random.key(1), (3, 4))
    x, target = interpolate(path, actions, noise, time)
    for step in range(4):
        alone = interpolate(path, actions[:, step : step + 1], noise[:, step : step + 1], time[:, step])
        np.testing.assert_array_equal(x[:, step : step + 1], alone[0])
        np.testing.assert_array_equal(target[:, step : step + 1], alone[1])
        data = estimate(path, target, x, time, "velocity").data[:, step]
        alone_data = estimate(path, alone[1], alone[0], time[:, step], "velocity").data[:, 0]
        np.testing.assert_array_equal(data, alone_data)


@paths
def test_the_target_is_what_its_name_says(pair, path):
    actions, noise = pair
    time = jnp.array([0.2, 0.5, 0.9])
    c = path.at(time[:, None, None])
    for predicts, expected in {
        "velocity": c.d_alpha * actions + c.d_sigma * noise,
        "noise": noise,
        "data": actions,
        "v": c.alpha * noise - c.sigma * actions,
    }.items():
        np.testing.assert_allclose(interpolate(path, *pair, time, predicts)[1], expected, atol=1e-6)


@paths
@settings(max_examples=20, deadline=None)
@given(time=st.floats(0.02, 0.98), seed=st.integers(0, 100))
def test_every_prediction_gives_every_other_one_at_any_time(path, time, seed):
    actions, noise = jax.random.normal(jax.random.key(seed), (2, 1, 2, 2))
    velocity = interpolate(path, actions, noise, jnp.full(1, time))[1]
    for predicts in PREDICTS:
        x, target = interpolate(path, actions, noise, jnp.full(1, time), predicts)
        np.testing.assert_allclose(to_velocity(path, target, x, time, predicts), velocity, rtol=1e-3, atol=1e-3)
        data, drawn = estimate(path, target, x, time, predicts)
        np.testing.assert_allclose(data, actions, atol=1e-3)
        np.testing.assert_allclose(drawn, noise, atol=1e-3)
        again = interpolate(path, data, drawn, jnp.full(1, time), predicts)[1]
        np.testing.assert_allclose(again, target, rtol=1e-3, atol=2e-3)


@paths
@predictions
def test_conversion_is_exact_for_means_over_data_too(path, predicts):
    # Every prediction is linear in data and noise, so that of posterior means is converted like that of one pair.
    x = jax.random.normal(jax.random.key(2), (3, 1, 2))
    data, noise = posterior(path, jnp.array([[[0.8, -0.5]]]), jnp.array([[[0.3, 1.2]]]))(x, 0.4)
    c = path.at(0.4)
    predicted = interpolate(path, data, noise, 0.4, predicts)[1]
    expected = c.d_alpha * data + c.d_sigma * noise
    np.testing.assert_allclose(to_velocity(path, predicted, x, 0.4, predicts), expected, rtol=1e-4, atol=1e-4)


@paths
@predictions
def test_conversions_are_finite_at_both_ends_and_continuous(path, predicts):
    x, predicted = jax.random.normal(jax.random.key(3), (2, 3, 1, 2))
    for end, inside in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        here = estimate(path, predicted, x, end, predicts)
        assert np.isfinite(here).all()
        assert np.isfinite(to_velocity(path, predicted, x, end, predicts)).all()
        np.testing.assert_allclose(here, estimate(path, predicted, x, inside, predicts), rtol=2e-2, atol=2e-2)
