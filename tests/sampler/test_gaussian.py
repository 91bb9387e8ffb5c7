"""From one Gaussian to another the marginal flow has a closed form: what is learnt and sampled has to match it."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.loss import flow_loss, loss_mask
from pi0_jax.flow.path import Cosine, Predicts, Straight, interpolate
from pi0_jax.flow.time import Uniform
from pi0_jax.sampler import Flow, integrate
from pi0_jax.sampler.exact import integrate_exactly
from pi0_jax.sampler.runge_kutta import RK4
from tests.flow.toy import Field, exact_end, exact_prediction, fit, gaussian_velocity
from tests.sampler.solvers import SOLVERS, make
from tests.sampler.test_solver import ORDERS

MEAN, DEVIATION = jnp.array([[[1.0, -0.5]]]), jnp.array([[[0.3, 1.5]]])
velocity = gaussian_velocity(MEAN, DEVIATION)
PATHS = {"straight": Straight(), "cosine": Cosine(), "cosine without offset": Cosine(offset=0.0)}


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
        noise, time = jax.random.normal(noise_key, data.shape), Uniform().sample(time_key, (256,))
        x, target = interpolate(Straight(), data, noise, time)
        return flow_loss(field.apply(params, x, time), target, loss_mask(x.shape))

    params = field.init(jax.random.key(0), jnp.zeros((1, 1, 2)), jnp.zeros(1))
    return functools.partial(field.apply, fit(loss, params, jax.random.key(1), 1500))


def matches(samples, tolerance: float):
    """Asserts mean and covariance of samples `[n, 1, 2]`."""
    samples = np.asarray(samples)[:, 0]
    np.testing.assert_allclose(samples.mean(0), MEAN[0, 0], atol=tolerance)
    np.testing.assert_allclose(np.cov(samples.T), np.diag(DEVIATION[0, 0] ** 2), atol=tolerance * 2)


def test_the_closed_form_carries_each_noise_to_mean_plus_deviation_times_it(noise):
    # It is an affine flow that keeps order, so x_0 = mean + deviation · x_1.
    end = jax.jit(lambda x: integrate(velocity, x, RK4(100)))(noise)
    np.testing.assert_allclose(end, MEAN + DEVIATION * noise, atol=1e-3)


def test_a_learnt_velocity_is_the_closed_form(learnt, noise):
    for time in (0.1, 0.5, 0.9):
        x = interpolate(Straight(), MEAN + DEVIATION * noise[::-1], noise, jnp.full(len(noise), time))[0]
        assert float(jnp.mean(jnp.square(learnt(x, time) - velocity(x, time)))) < 0.03


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_of_a_learnt_velocity_have_the_datas_mean_and_covariance(learnt, noise, solver):
    num_steps = 40 if ORDERS[solver] == 1 else 15
    matches(jax.jit(lambda x: integrate(learnt, x, make(solver, num_steps)))(noise), 0.12)


def test_the_adaptive_solver_agrees_with_many_small_steps_of_a_learnt_velocity(learnt, noise):
    small = jax.jit(lambda x: integrate(learnt, x, RK4(100)))(noise[:64])
    np.testing.assert_allclose(jax.jit(lambda x: integrate_exactly(learnt, x))(noise[:64]), small, atol=1e-3)


@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predicts", typing.get_args(Predicts))
@pytest.mark.parametrize("solver", SOLVERS)
def test_whatever_is_predicted_every_solver_ends_at_the_same_actions(noise, solver, predicts, path, power):
    few = noise[:256]
    flow = Flow(exact_prediction(PATHS[path], predicts, MEAN, DEVIATION), PATHS[path], predicts)
    end = jax.jit(lambda x: integrate(flow, x, make(solver, 100, power)))(few)
    np.testing.assert_allclose(end, exact_end(PATHS[path], MEAN, DEVIATION, few), atol=0.1)
