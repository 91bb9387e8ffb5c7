import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.flow.path import interpolate


def test_the_path_runs_from_data_at_0_to_noise_at_1():
    actions, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    np.testing.assert_array_equal(interpolate(actions, noise, jnp.zeros(3))[0], actions)
    np.testing.assert_array_equal(interpolate(actions, noise, jnp.ones(3))[0], noise)


def test_the_velocity_is_the_derivative_of_the_path():
    actions, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    time = jnp.array([0.2, 0.5, 0.9])
    _, velocity = interpolate(actions, noise, time)
    _, derivative = jax.jvp(lambda t: interpolate(actions, noise, t)[0], (time,), (jnp.ones(3),))
    np.testing.assert_allclose(velocity, derivative, atol=1e-6)


def test_time_may_differ_between_the_actions_of_a_chunk():
    actions, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    time = jax.random.uniform(jax.random.key(1), (3, 4))
    x, _ = interpolate(actions, noise, time)
    for step in range(4):
        alone, _ = interpolate(actions[:, step : step + 1], noise[:, step : step + 1], time[:, step])
        np.testing.assert_array_equal(x[:, step : step + 1], alone)
