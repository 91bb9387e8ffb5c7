"""From one Gaussian to another the marginal flow has a closed form: what is learnt and sampled has to match it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.exact import integrate_exactly
from pi0_jax.flow.grid import given_grid, warped_grid
from pi0_jax.flow.loss import flow_loss
from pi0_jax.flow.path import interpolate
from pi0_jax.flow.solvers import TABLEAUS, integrate
from pi0_jax.flow.time import sample_time
from tests.flow.toy import Field, fit, gaussian_velocity

MEAN, DEVIATION = jnp.array([[1.0, -0.5]]), jnp.array([[0.3, 1.5]])
velocity = gaussian_velocity(MEAN, DEVIATION)
GRIDS = {"uniform": warped_grid, "finer at data": lambda n: warped_grid(n, 1.7), "uneven": lambda n: uneven_grid(n)}


def uneven_grid(num_steps: int):
    """Steps that are long and short in turn."""
    lengths = np.tile([1.0, 2.0], num_steps // 2)
    return given_grid([*(1 - np.cumsum([0, *lengths[:-1]]) / lengths.sum()), 0.0])


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (4096, 1, 2))


@pytest.fixture(scope="module")
def learnt():
    """A velocity learnt from samples of the data by the objective of `pi0.loss`."""
    field = Field()

    def loss(params, key):
        data_key, noise_key, time_key = jax.random.split(key, 3)
        data = MEAN + DEVIATION * jax.random.normal(data_key, (256, 1, 2))
        x, target = interpolate(
            data, jax.random.normal(noise_key, data.shape), time := sample_time(time_key, (256,), "uniform")
        )
        return flow_loss(field.apply(params, x, time), target)

    params = field.init(jax.random.key(0), jnp.zeros((1, 1, 2)), jnp.zeros(1))
    return functools.partial(field.apply, fit(loss, params, jax.random.key(1), 1500))


def matches(samples, tolerance: float):
    """Asserts mean and covariance of samples `[n, 1, 2]`."""
    samples = np.asarray(samples)[:, 0]
    np.testing.assert_allclose(samples.mean(0), MEAN[0], atol=tolerance)
    np.testing.assert_allclose(np.cov(samples.T), np.diag(DEVIATION[0] ** 2), atol=tolerance * 2)


def test_the_closed_form_carries_each_noise_to_mean_plus_deviation_times_it(noise):
    # It is an affine flow that keeps order, so x_0 = mean + deviation · x_1.
    end = jax.jit(lambda x: integrate(velocity, x, 100, "rk4"))(noise)
    np.testing.assert_allclose(end, MEAN + DEVIATION * noise, atol=1e-3)


def test_a_learnt_velocity_is_the_closed_form(learnt, noise):
    for time in (0.1, 0.5, 0.9):
        x = interpolate(MEAN + DEVIATION * noise[::-1], noise, jnp.full(len(noise), time))[0]
        assert float(jnp.mean(jnp.square(learnt(x, time) - velocity(x, time)))) < 0.03


@pytest.mark.parametrize("solver", TABLEAUS)
def test_samples_of_a_learnt_velocity_have_the_mean_and_the_covariance_of_the_data(learnt, noise, solver):
    matches(jax.jit(lambda x: integrate(learnt, x, 40 if solver == "euler" else 15, solver))(noise), 0.12)


def measured_order(field, start, exact, solver, grid, steps) -> float:
    """Slope of the error over the number of steps; float64 but for the times."""
    with jax.enable_x64(True):
        run = jax.jit(lambda x, times: integrate(field, x, times, solver))
        ends = [np.asarray(run(start, GRIDS[grid](int(n)))) for n in steps]
    errors = [np.abs(end - exact).max() for end in ends]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", TABLEAUS)
def test_every_solver_converges_at_its_order_on_every_grid(solver, grid):
    order = TABLEAUS[solver].order
    # Times are float32: RK4 takes few steps, so that its error stays above their rounding.
    steps = np.array([2, 4, 8]) * (1 if order == 4 else 16)
    measured = measured_order(
        lambda x, t: x * jnp.cos(t), np.ones((1, 1, 1)), np.exp(-np.sin(1.0)), solver, grid, steps
    )
    assert measured == pytest.approx(order, abs=0.5)
    # A flow between Gaussians is kinder to some solvers than their order promises.
    start = np.array([[[1.0, -0.7]]])
    exact = np.asarray(MEAN, np.float64) + np.asarray(DEVIATION, np.float64) * start
    steps = {1: [32, 64, 128], 2: [16, 32, 64], 4: [6, 12, 24]}[order]
    assert measured_order(velocity, start, exact, solver, grid, np.array(steps)) > order - 0.4


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
def test_the_adaptive_solver_gives_the_closed_form(noise, solver):
    end = jax.jit(lambda x: integrate_exactly(velocity, x, solver=solver))(noise)
    np.testing.assert_allclose(end, MEAN + DEVIATION * noise, atol=2e-3)


def test_the_adaptive_solver_agrees_with_many_small_steps_of_a_learnt_velocity(learnt, noise):
    small = jax.jit(lambda x: integrate(learnt, x, 100, "rk4"))(noise[:64])
    np.testing.assert_allclose(jax.jit(lambda x: integrate_exactly(learnt, x))(noise[:64]), small, atol=1e-3)


def test_the_adaptive_solver_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="choose tsit5 or dopri5"):
        integrate_exactly(velocity, jnp.zeros((1, 1, 2)), solver="euler")  # pyright: ignore


def test_a_grid_that_is_written_down_may_be_traced_and_equals_the_uniform_one():
    run = jax.jit(lambda x, grid: integrate(velocity, x, grid))
    start = jnp.ones((3, 1, 2))
    np.testing.assert_allclose(
        run(start, given_grid([1, 0.75, 0.5, 0.25, 0])), integrate(velocity, start, 4), rtol=1e-5
    )
    run(start, given_grid([1, 0.9, 0.5, 0.1, 0]))
    assert run._cache_size() == 1


def test_a_warped_grid_is_a_grid_and_power_1_is_uniform():
    for power in (0.5, 1.0, 3.0):
        given_grid(warped_grid(7, power).tolist())
    np.testing.assert_allclose(warped_grid(5), 1 - np.arange(6) / 5, atol=1e-7)
    assert warped_grid(5, 2.0)[1] < warped_grid(5)[1]


@pytest.mark.parametrize(
    "times", [[1.0], [1, 0.5], [0.9, 0], [1, 0.5, 0.5, 0], [0, 1], [1, 0.2, 0.4, 0], [1, np.nan, 0]]
)
def test_a_grid_that_does_not_fall_from_1_to_0_is_refused(times):
    with pytest.raises(ValueError, match="fall strictly from 1"):
        given_grid(times)


@pytest.mark.parametrize(("num_steps", "power"), [(0, 1.0), (3, 0.0), (3, -1.0), (3, float("nan"))])
def test_a_warped_grid_without_steps_or_with_a_power_that_is_not_positive_is_refused(num_steps, power):
    with pytest.raises(ValueError, match="have to be positive"):
        warped_grid(num_steps, power)
