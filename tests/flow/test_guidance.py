import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.diffusion import denoise
from pi0_jax.flow.guidance import classifier_free
from pi0_jax.flow.solvers import TABLEAUS, integrate
from tests.flow.toy import gaussian_velocity

told = gaussian_velocity(jnp.array([[2.0, 0.0]]), jnp.array([[0.5, 1.0]]))
untold = gaussian_velocity(jnp.zeros((1, 2)), jnp.array([[2.0, 1.0]]))


def both(x, time):
    """As a network does it: the first half of the batch is told the condition, the second is not."""
    first, second = jnp.split(x, 2)
    return jnp.concatenate([told(first, time), untold(second, time)])


def field(scale):
    return lambda x, time: untold(x, time) + scale * (told(x, time) - untold(x, time))


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (8, 1, 2))


@pytest.mark.parametrize("solver", TABLEAUS)
def test_guided_samples_are_those_of_the_guided_field_at_any_scale_in_one_program(noise, solver):
    guided = jax.jit(lambda x, scale: integrate(classifier_free(both, scale), x, 10, solver))
    for scale in (0.0, 0.7, 1.0, 3.0):
        expected = integrate(field(scale), noise, 10, solver)
        np.testing.assert_allclose(guided(noise, scale), expected, atol=1e-4, rtol=1e-4)
    assert guided._cache_size() == 1


@pytest.mark.parametrize("scale", [1.0, jnp.float32(1.0)])
def test_scale_1_is_the_conditional_velocity_exactly(noise, scale):
    for time in (0.0, 0.3, 1.0):
        np.testing.assert_array_equal(classifier_free(both, scale)(noise, time), told(noise, time))


def test_scale_0_ignores_the_condition(noise):
    np.testing.assert_allclose(classifier_free(both, 0.0)(noise, 0.4), untold(noise, 0.4), atol=1e-6)


def test_a_larger_scale_exaggerates_the_condition(noise):
    means = [float(integrate(classifier_free(both, s), noise, 20)[..., 0].mean()) for s in (0.0, 1.0, 2.0)]
    assert means[0] < means[1] < means[2]


def test_diffusion_takes_a_guided_prediction_too(noise):
    sampled = jax.jit(lambda x, scale: denoise(classifier_free(both, scale), x, 5, "v"))(noise, 2.0)
    np.testing.assert_allclose(sampled, denoise(field(2.0), noise, 5, "v"), atol=1e-4)
