"""Denoising with the exact prediction for Gaussian data gives that Gaussian back, whatever is predicted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.path import Cosine, Straight
from pi0_jax.sampler import Euler, Flow, integrate, trajectory
from pi0_jax.sampler.ddim import DDIM
from tests.flow.toy import exact_prediction

MEAN, DEVIATION = jnp.array([[[0.8, -0.5]]]), jnp.array([[[0.3, 1.2]]])
PATH = Cosine()
PREDICTIONS = ("noise", "v")


def exact(predicts: str) -> Flow:
    """What the best network predicts for data N(MEAN, DEVIATION²): the posterior mean of its target."""
    return Flow(exact_prediction(PATH, predicts, MEAN, DEVIATION), PATH, predicts)  # pyright: ignore


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (4096, 1, 2))


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample(noise, predicts, num_steps, keys=None):
    return integrate(exact(predicts), noise, DDIM(num_steps, eta=float(keys is not None), clip=100.0), keys=keys)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("ancestral", [False, True], ids=["ddim", "ddpm"])
def test_exact_predictions_give_the_mean_and_covariance_of_the_data(noise, predicts, ancestral):
    keys = jax.random.split(jax.random.key(1), len(noise)) if ancestral else None
    samples = np.asarray(sample(noise, predicts, 100, keys))[:, 0]
    np.testing.assert_allclose(samples.mean(0), MEAN[0, 0], atol=0.05)
    np.testing.assert_allclose(np.cov(samples.T), np.diag(DEVIATION[0, 0] ** 2), atol=0.1)


def test_without_keys_nothing_is_random_and_it_is_ddims_map_to_the_data(noise):
    # The deterministic map of a Gaussian is affine and keeps order.
    np.testing.assert_allclose(sample(noise, "v", 100), MEAN + DEVIATION * noise, atol=0.15)
    np.testing.assert_array_equal(sample(noise, "v", 100), sample(noise, "v", 100))


def test_both_predictions_take_the_same_way(noise):
    np.testing.assert_allclose(sample(noise, "noise", 10), sample(noise, "v", 10), atol=1e-2)


def test_keys_decide_what_is_added_and_each_chunk_has_its_own(noise):
    few, keys = noise[:3], jax.random.split(jax.random.key(1), 3)
    first = sample(few, "v", 10, keys)
    np.testing.assert_array_equal(first, sample(few, "v", 10, keys))
    assert np.abs(first - sample(few, "v", 10)).min() > 0
    other = sample(few, "v", 10, keys.at[0].set(jax.random.key(9)))
    assert np.abs(first - other)[0].min() > 0
    np.testing.assert_allclose(other[1:], first[1:], atol=1e-6)


def test_less_fresh_noise_than_all_of_it_still_gives_the_data(noise):
    keys = jax.random.split(jax.random.key(1), len(noise))
    run = jax.jit(lambda x: integrate(exact("v"), x, DDIM(100, eta=0.5, clip=None), keys=keys))
    samples = np.asarray(run(noise))[:, 0]
    np.testing.assert_allclose(np.cov(samples.T), np.diag(DEVIATION[0, 0] ** 2), atol=0.1)


def test_the_path_starts_at_noise_and_ends_at_the_result(noise):
    points = trajectory(exact("v"), noise[:3], DDIM(5))
    assert points.shape == (6, 3, 1, 2)
    np.testing.assert_array_equal(points[0], noise[:3])
    np.testing.assert_array_equal(points[-1], integrate(exact("v"), noise[:3], DDIM(5)))


def test_actions_are_cut_to_what_is_usual(noise):
    def wild(x, time):
        return jnp.full_like(x, 50.0)

    assert float(jnp.abs(integrate(Flow(wild, PATH, "noise"), noise[:3], DDIM(5, clip=2.0))).max()) <= 2.0


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_on_the_straight_path_it_is_eulers_method(noise, power):
    flow = Flow(exact_prediction(Straight(), "velocity", MEAN, DEVIATION))
    ends = [integrate(flow, noise[:5], solver) for solver in (Euler(6, power), DDIM(6, power, clip=None))]
    np.testing.assert_allclose(*ends, atol=1e-5)


def test_fewer_than_one_step_is_refused(noise):
    with pytest.raises(ValueError, match="at least 1 step"):
        integrate(exact("v"), noise, DDIM(0))


def test_fresh_noise_takes_keys_and_a_share_of_it_is_at_most_1(noise):
    with pytest.raises(ValueError, match="give `keys`, one per chunk"):
        integrate(exact("v"), noise, DDIM(3, eta=1.0))
    with pytest.raises(ValueError, match=r"DDIM.eta is 1.5"):
        DDIM(eta=1.5)
