import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.guidance import classifier_free
from pi0_jax.flow.path import Cosine, Straight
from pi0_jax.sampler import Euler, Flow, integrate
from tests.flow.toy import exact_prediction, gaussian_velocity
from tests.sampler.solvers import SOLVERS, make

CONDITION = jnp.array([[[2.0, 0.0]]]), jnp.array([[[0.5, 1.0]]])
NO_CONDITION = jnp.zeros((1, 1, 2)), jnp.array([[[2.0, 1.0]]])
conditional, unconditional = gaussian_velocity(*CONDITION), gaussian_velocity(*NO_CONDITION)


def halves(first, second):
    """As a network does it: the first half of the batch has the condition, the second has not."""

    def both(x, time):
        a, b = jnp.split(x, 2)
        return jnp.concatenate([first(a, time), second(b, time)])

    return both


def mixed(first, second, scale):
    return lambda x, time: second(x, time) + scale * (first(x, time) - second(x, time))


both = halves(conditional, unconditional)


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (8, 1, 2))


@pytest.mark.parametrize("solver", SOLVERS)
def test_guided_samples_are_those_of_the_guided_field_in_one_program(noise, solver):
    solver = make(solver, 10)
    guided = jax.jit(lambda x, scale: integrate(classifier_free(both, scale), x, solver))
    for scale in (0.0, 0.7, 1.0, 3.0):
        expected = integrate(mixed(conditional, unconditional, scale), noise, solver)
        np.testing.assert_allclose(guided(noise, scale), expected, atol=1e-4, rtol=1e-4)
    assert guided._cache_size() == 1


@pytest.mark.parametrize("scale", [1.0, jnp.float32(1.0)])
def test_scale_1_is_the_conditional_velocity_exactly(noise, scale):
    for time in (0.0, 0.3, 1.0):
        np.testing.assert_array_equal(classifier_free(both, scale)(noise, time), conditional(noise, time))


def test_scale_0_ignores_the_condition(noise):
    np.testing.assert_allclose(classifier_free(both, 0.0)(noise, 0.4), unconditional(noise, 0.4), atol=1e-6)


def test_a_larger_scale_exaggerates_the_condition(noise):
    means = [float(integrate(classifier_free(both, s), noise, Euler(20))[..., 0].mean()) for s in (0.0, 1.0, 2.0)]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("predicts", ["noise", "data", "v"])
@pytest.mark.parametrize("path", [Straight(), Cosine()], ids=["straight", "cosine"])
@pytest.mark.parametrize("solver", ["DDIM", "DPMSolver2M", "Euler"])
def test_any_prediction_may_be_guided_and_means_the_same(noise, solver, path, predicts):
    def flow(predicts, wrap):
        pair = (exact_prediction(path, predicts, *c) for c in (CONDITION, NO_CONDITION))
        return Flow(wrap(*pair), path, predicts)

    def run(predicts, wrap):
        return jax.jit(lambda x: integrate(flow(predicts, wrap), x, make(solver, 5)))(noise)

    guided = run(predicts, lambda *pair: classifier_free(halves(*pair), 2.0))
    np.testing.assert_allclose(guided, run(predicts, lambda *pair: mixed(*pair, 2.0)), atol=1e-3)
    times = jnp.float32(0.6)
    velocities = [flow(kind, lambda *pair: classifier_free(halves(*pair), 2.0)).velocity(noise, times)
                  for kind in (predicts, "velocity")]  # fmt: skip
    np.testing.assert_allclose(*velocities, atol=1e-4, rtol=1e-4)
