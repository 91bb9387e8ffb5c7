"""Every solver of the folder: its order, its evaluations, and what all have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.path import Cosine, Straight, interpolate
from pi0_jax.sampler import Euler, Flow, integrate, trajectory
from pi0_jax.sampler.grid import Grid, grid_of, power_grid
from tests.flow.toy import exact_end, exact_prediction
from tests.sampler.solvers import SOLVERS, make

MEAN, DEVIATION = np.array([[[1.0, -0.5]]]), np.array([[[0.3, 1.5]]])
ORDERS = {"Euler": 1, "Midpoint": 2, "Heun": 2, "RK4": 4, "AdamsBashforth2": 2, "DDIM": 1, "DPMSolver2M": 2}
"""The error falls as the length of the steps to this power."""
EVALUATIONS = ORDERS | {"AdamsBashforth2": 1, "DPMSolver2M": 1}
"""Per step."""
LOGARITHM = {"DPMSolver2M"}
"""Steps from and to the ends are infinite in the logarithm of alpha / sigma: the error is that order times log n."""
PATHS = {"straight": Straight(), "cosine": Cosine(offset=0.0, min_alpha=1e-9)}
GRIDS = {"uniform": power_grid, "finer at data": lambda n: power_grid(n, 1.7), "uneven": lambda n: uneven_grid(n)}
solvers = pytest.mark.parametrize("solver", SOLVERS)


def uneven_grid(num_steps: int) -> Grid:
    """Steps that are long and short in turn."""
    lengths = np.tile([1.0, 2.0], num_steps // 2)
    return grid_of([*(1 - np.cumsum([0, *lengths[:-1]]) / lengths.sum()), 0.0])


def measured_order(flow, start, end, solver: str, grid: str, steps) -> float:
    """Slope of the error over the number of steps; float64 but for times and coefficients of paths."""
    with jax.enable_x64(True):
        run = jax.jit(lambda x, grid: integrate(flow, x, make(solver, 1), grid=grid))
        ends = [np.asarray(run(start, GRIDS[grid](int(n)))) for n in steps]
    errors = [np.abs(found - end).max() for found in ends]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def steps(solver: str) -> np.ndarray:
    """Numbers of steps at which the error is neither that of few steps nor that of rounding."""
    return np.array([2, 4, 8]) * ({1: 32, 2: 16, 4: 1}[ORDERS[solver]] * (3 if solver in LOGARITHM else 1))


def test_every_solver_has_its_order_here():
    assert set(ORDERS) == set(SOLVERS)


@pytest.mark.parametrize("grid", GRIDS)
@solvers
def test_a_solver_converges_at_its_order_on_every_grid(solver, grid):
    # dx/dt = x cos t from t = 1 to 0 ends at exp(-sin 1). Times are float32: RK4 takes few steps, so that its error
    # stays above their rounding.
    order = ORDERS[solver]
    flow = Flow(lambda x, t: x * jnp.cos(t))
    measured = measured_order(flow, np.ones((1, 1, 1)), np.exp(-np.sin(1.0)), solver, grid, steps(solver))
    assert measured == pytest.approx(order, abs=0.35 if grid == "uniform" and solver not in LOGARITHM else 0.5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", GRIDS)
@solvers
def test_between_gaussians_a_solver_converges_at_least_at_its_order(solver, grid, path):
    # The closed form is kinder to some solvers than their order promises.
    order = ORDERS[solver]
    start = np.array([[[1.0, -0.7]]])
    with jax.enable_x64(True):
        end = np.asarray(exact_end(PATHS[path], MEAN, DEVIATION, start))
    flow = Flow(exact_prediction(PATHS[path], "velocity", MEAN, DEVIATION), PATHS[path])
    measured = measured_order(flow, start, end, solver, grid, steps(solver) * (3 if order == 4 else 2))
    assert measured > order - (0.5 if solver in LOGARITHM else 0.4)


@solvers
def test_a_solver_evaluates_the_network_so_often_per_step(solver):
    seen = []
    with jax.disable_jit():
        integrate(lambda x, t: seen.append(float(t)) or x, jnp.ones((1, 1, 1)), make(solver, 3))
    assert len(seen) == 3 * EVALUATIONS[solver]
    assert max(seen) == 1
    assert min(seen) >= -1e-6


@solvers
def test_one_step_is_exact_on_a_straight_flow(solver):
    actions, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    _, velocity = interpolate(Straight(), actions, noise, jnp.zeros(3))
    for num_steps in (1, 4):
        end = integrate(lambda x, t: velocity, noise, make(solver, num_steps))
        np.testing.assert_allclose(end, actions, atol=2e-6)


@solvers
def test_the_path_starts_at_noise_and_ends_at_the_result(solver):
    noise = jnp.ones((1, 2, 3))
    points = trajectory(lambda x, t: x, noise, make(solver, 5))
    assert points.shape == (6, 1, 2, 3)
    np.testing.assert_array_equal(points[0], noise)
    np.testing.assert_array_equal(points[-1], integrate(lambda x, t: x, noise, make(solver, 5)))


def test_any_number_of_steps_spans_the_whole_interval():
    for num_steps in (1, 3, 7, 10, 50):
        seen = []
        with jax.disable_jit():
            integrate(lambda x, t: seen.append(float(t)) or x, jnp.ones((1, 1, 1)), Euler(num_steps))
        np.testing.assert_allclose(seen, 1 - np.arange(num_steps) / num_steps, atol=1e-5)


@solvers
def test_a_point_is_projected_before_the_first_step_and_after_each(solver):
    def project(x):
        return x.at[:, 0].set(7.0)

    points = trajectory(lambda x, t: x, jnp.ones((2, 3, 1)), make(solver, 3), project=project)
    np.testing.assert_array_equal(points[:, :, 0], 7.0)
    assert (np.asarray(points[1:, :, 1:]) != 7).all()
    np.testing.assert_array_equal(integrate(lambda x, t: x, jnp.ones((2, 3, 1)), make(solver, 3), project=project),
                                  points[-1])  # fmt: skip


@solvers
def test_features_of_the_grids_times_reach_the_prediction_at_those_times(solver):
    grid = power_grid(4, 2.0)

    def predict(x, time, features=None):
        # The features say nothing but the time; stages between the grid's times have none.
        return x * (time if features is None else features)

    run = jax.jit(lambda x, features: integrate(predict, x, make(solver, 4, 2.0), features=features))
    x = jnp.ones((2, 1, 1))
    np.testing.assert_allclose(run(x, jnp.asarray(grid.times[:-1])), run(x, None), rtol=1e-6)
    assert np.abs(run(x, jnp.zeros(4)) - run(x, None)).max() > 1e-3


@solvers
@pytest.mark.parametrize(("num_steps", "power"), [(0, 1.0), (3, 0.0)])
def test_fewer_than_one_step_or_a_power_not_positive_is_refused(solver, num_steps, power):
    with pytest.raises(ValueError, match="at least 1 step"):
        integrate(lambda x, t: x, jnp.ones((1, 1, 1)), make(solver, num_steps, power))
