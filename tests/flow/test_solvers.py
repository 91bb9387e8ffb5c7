import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.path import interpolate
from pi0_jax.flow.solvers import TABLEAUS, integrate


@pytest.mark.parametrize("solver", TABLEAUS)
def test_solver_converges_at_its_order(solver):
    # dx/dt = x cos t from t = 1 to 0 ends at exp(-sin 1). Times are float32: RK4 takes few steps, so that its error
    # stays above their rounding.
    steps = np.array([2, 4, 8]) * (1 if TABLEAUS[solver].order == 4 else 16)
    with jax.enable_x64(True):
        ends = [integrate(lambda x, t: x * jnp.cos(t), jnp.ones((1, 1, 1)), int(n), solver).item() for n in steps]
    errors = np.abs(np.array(ends) - np.exp(-np.sin(1.0)))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(TABLEAUS[solver].order, abs=0.35)


@pytest.mark.parametrize("solver", TABLEAUS)
def test_one_step_is_exact_on_a_straight_flow(solver):
    actions, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    _, velocity = interpolate(actions, noise, jnp.zeros(3))
    np.testing.assert_allclose(integrate(lambda x, t: velocity, noise, 1, solver), actions, atol=1e-6)


def test_the_path_starts_at_noise_and_ends_at_the_result():
    noise = jnp.ones((1, 2, 3))
    end, points = integrate(lambda x, t: x, noise, 5, path=True)
    assert points.shape == (6, 1, 2, 3)
    np.testing.assert_array_equal(points[0], noise)
    np.testing.assert_array_equal(points[-1], end)


def test_any_number_of_steps_spans_the_whole_interval():
    for num_steps in (1, 3, 7, 10, 50):
        seen = []
        with jax.disable_jit():
            integrate(lambda x, t: seen.append(float(t)) or x, jnp.ones((1, 1, 1)), num_steps)
        np.testing.assert_allclose(seen, 1 - np.arange(num_steps) / num_steps, atol=1e-5)


def test_a_wrong_solver_or_step_count_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'euler'"):
        integrate(lambda x, t: x, jnp.ones((1, 1, 1)), 3, "eular")
    with pytest.raises(ValueError, match="at least 1"):
        integrate(lambda x, t: x, jnp.ones((1, 1, 1)), 0)
