import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.sampler import Euler, integrate
from pi0_jax.sampler.grid import euler_grid, grid_of, power_grid
from tests.flow.toy import gaussian_velocity

velocity = gaussian_velocity(jnp.array([[[1.0, -0.5]]]), jnp.array([[[0.3, 1.5]]]))


def test_a_grid_that_is_written_down_may_be_traced_and_equals_the_uniform_one():
    run = jax.jit(lambda x, grid: integrate(velocity, x, Euler(), grid=grid))
    start = jnp.ones((3, 1, 2))
    np.testing.assert_allclose(
        run(start, grid_of([1, 0.75, 0.5, 0.25, 0])), integrate(velocity, start, Euler(4)), rtol=1e-5
    )
    run(start, grid_of([1, 0.9, 0.5, 0.1, 0]))
    assert run._cache_size() == 1


def test_a_power_grid_is_a_grid_and_power_1_is_uniform():
    for power in (0.5, 1.0, 3.0):
        grid = power_grid(7, power)
        np.testing.assert_allclose(grid_of(grid.times.tolist()).dt, grid.dt, atol=1e-6)
        assert (grid.times.dtype, grid.dt.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(power_grid(5).times, 1 - np.arange(6) / 5, atol=1e-6)
    assert power_grid(5, 2.0).times[1] < power_grid(5).times[1]


@pytest.mark.parametrize("num_steps", [1, 3, 10, 50])
def test_equal_steps_are_added_up_in_float32_as_openpi_adds_them(num_steps):
    time, dt = np.float32(1.0), np.float32(-1.0 / num_steps)
    for expected in euler_grid(num_steps).times[:-1]:
        assert time == expected
        time = np.float32(time + dt)
    assert euler_grid(num_steps).times[-1] == 0
    np.testing.assert_array_equal(euler_grid(num_steps).dt, dt)


@pytest.mark.parametrize(
    "times", [[1.0], [1, 0.5], [0.9, 0], [1, 0.5, 0.5, 0], [0, 1], [1, 0.2, 0.4, 0], [1, np.nan, 0]]
)
def test_a_grid_that_does_not_fall_from_1_to_0_is_refused(times):
    with pytest.raises(ValueError, match="fall strictly from 1"):
        grid_of(times)


@pytest.mark.parametrize(("num_steps", "power"), [(0, 1.0), (3, 0.0), (3, -1.0), (3, float("nan"))])
def test_a_power_grid_without_steps_or_with_a_power_not_positive_is_refused(num_steps, power):
    with pytest.raises(ValueError, match="at least 1 step and a positive power"):
        power_grid(num_steps, power)
