"""Real-time chunking on velocities whose answer is known."""

import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.guidance import classifier_free
from pi0_jax.flow.path import Cosine, Straight
from pi0_jax.flow.realtime import (
    Previous,
    Schedule,
    continue_prefix,
    guidance_factor,
    is_clean,
    prefix_weights,
    real_time_chunking,
)
from pi0_jax.sampler import Euler, Flow, integrate
from tests.flow.toy import exact_prediction, gaussian_velocity
from tests.sampler.solvers import SOLVERS, make
from tests.sampler.test_solver import EVALUATIONS

HORIZON = 8


@pytest.fixture(scope="module")
def noise():
    return jax.random.normal(jax.random.key(0), (16, HORIZON, 2))


@pytest.fixture(scope="module")
def previous():
    actions = jnp.broadcast_to(jnp.linspace(0.5, 1.5, HORIZON)[:, None], (16, HORIZON, 2))
    return Previous(actions, jnp.full(16, 2), jnp.full(16, 5))


def walk(x, time):
    """Velocity of data whose actions are a random walk of variance 1 a step: a Gaussian with correlated actions."""
    i = jnp.arange(1, HORIZON + 1)
    covariance = jnp.minimum(i[:, None], i[None, :]).astype(jnp.float32)
    t = jnp.asarray(time)
    total = t**2 * jnp.eye(HORIZON) + (1 - t) ** 2 * covariance
    return jnp.einsum("IJ,BJD->BID", t * jnp.eye(HORIZON) - (1 - t) * covariance, jnp.linalg.solve(total[None], x))


def test_weights_are_the_papers_at_a_known_place():
    # H = 10, d = 2, s = 4: c = (6 - i) / 5 from i = 2 to 5.
    c = np.array([4, 3, 2, 1]) / 5
    for schedule, between in {"linear": c, "exp": c * np.expm1(c) / np.expm1(1), "ones": c**0, "zeros": 0 * c}.items():
        expected = np.concatenate([[1, 1], between, np.zeros(4)])
        np.testing.assert_allclose(prefix_weights(jnp.int32(2), jnp.int32(6), 10, schedule), expected, atol=1e-6)


@pytest.mark.parametrize("schedule", typing.get_args(Schedule))
def test_weights_fall_from_one_to_zero_whatever_the_delay(schedule):
    delay, end = np.meshgrid(np.arange(HORIZON + 3), np.arange(HORIZON + 1))
    weights = np.asarray(prefix_weights(jnp.asarray(delay), jnp.asarray(end), HORIZON, schedule))
    step = np.arange(HORIZON)
    assert (np.diff(weights) <= 0).all()
    assert (weights[step < np.minimum(delay, end)[..., None]] == 1).all()
    assert (weights[step >= end[..., None]] == 0).all()
    assert (weights[end == 0] == 0).all()  # no previous chunk
    certain = weights[(delay >= end)]  # all that is left will be executed: nothing is soft
    assert set(np.unique(certain)) <= {0.0, 1.0}


def test_the_factor_is_the_papers_and_bounded_at_both_ends():
    for time in (0.1, 0.5, 0.9):
        tau = 1 - time
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        np.testing.assert_allclose(guidance_factor(jnp.float32(time), 1e9), (1 - tau) / (tau * r2), rtol=1e-5)
    for time in (1.0, 0.0, -1e-7, 1.0000001):
        assert guidance_factor(jnp.float32(time), 5.0) == 5.0


def test_on_the_cosine_path_the_factor_is_the_rate_over_alpha_and_sigma():
    for time in (0.1, 0.5, 0.9):
        c = Cosine(offset=0.0).at(jnp.float32(time))
        expected = np.pi / 2 / (c.alpha * c.sigma)
        np.testing.assert_allclose(guidance_factor(jnp.float32(time), 1e9, Cosine(offset=0.0)), expected, rtol=1e-4)
    for time in (1.0, 0.0):
        assert guidance_factor(jnp.float32(time), 5.0, Cosine()) == 5.0


identity_real_time_chunking = functools.partial(real_time_chunking, through_network=False)


@pytest.mark.parametrize("chunking", [real_time_chunking, identity_real_time_chunking], ids=["guidance", "identity"])
def test_without_a_previous_chunk_the_velocity_is_the_plain_one(noise, previous, chunking):
    absent = previous._replace(end=previous.end.at[::2].set(0))
    guided = chunking(walk, absent)(noise, jnp.float32(0.7))
    np.testing.assert_array_equal(guided[::2], walk(noise, jnp.float32(0.7))[::2])
    assert np.abs(guided[1::2] - walk(noise, jnp.float32(0.7))[1::2]).max() > 0.1


def test_the_correction_of_a_linear_velocity_is_the_closed_form(noise, previous):
    # v = A x makes the line end at (I - t A) x, whose transposed Jacobian is (I - t A)'.
    matrix = jax.random.normal(jax.random.key(1), (HORIZON, HORIZON))
    velocity = lambda x, time: jnp.einsum("IJ,BJD->BID", matrix, x)  # noqa: E731
    time = jnp.float32(0.6)
    landing = jnp.eye(HORIZON) - time * matrix
    weights = prefix_weights(previous.delay, previous.end, HORIZON, "exp")[..., None]
    error = weights * (previous.actions - jnp.einsum("IJ,BJD->BID", landing, noise))
    for chunking, correction in (
        (real_time_chunking, jnp.einsum("JI,BJD->BID", landing, error)),
        (identity_real_time_chunking, error),
    ):
        expected = velocity(noise, time) - guidance_factor(time, 5.0) * correction
        guided = chunking(velocity, previous, "exp", 5.0)(noise, time)
        np.testing.assert_allclose(guided, expected, rtol=2e-5, atol=2e-5)


def test_guided_samples_approach_the_previous_chunk_and_keep_to_the_data(noise, previous):
    def miss(sample, steps):
        return float(jnp.abs(sample - previous.actions)[:, steps].mean())

    plain = integrate(walk, noise, Euler(20))
    guided = integrate(real_time_chunking(walk, previous), noise, Euler(20))
    prefix, free = slice(0, 2), slice(5, None)
    assert miss(guided, prefix) < 0.1 * miss(plain, prefix)
    # A walk that starts there goes on from there: the free steps follow by the data's correlation, unguided.
    seam = jnp.abs(guided[:, 5] - guided[:, 4]).mean()
    assert seam < 1.3 * float(jnp.abs(plain[:, 5] - plain[:, 4]).mean())
    assert miss(guided, free) < miss(plain, free)
    # Independent actions have nothing to follow by: theirs are free.
    independent = gaussian_velocity(jnp.zeros((1, HORIZON, 2)), jnp.ones((1, HORIZON, 2)))
    loose = integrate(real_time_chunking(independent, previous), noise, Euler(20))
    np.testing.assert_allclose(loose[:, free], integrate(independent, noise, Euler(20))[:, free], atol=1e-5)


def test_one_program_serves_all_delays_ends_and_bounds(noise, previous):
    run = jax.jit(lambda previous, bound: integrate(real_time_chunking(walk, previous, "exp", bound), noise, Euler(5)))
    results = [run(previous._replace(delay=jnp.full(16, d), end=jnp.full(16, e)), jnp.float32(bound))
               for d, e, bound in ((0, 3, 5.0), (2, 6, 5.0), (2, 6, 1.0))]  # fmt: skip
    assert run._cache_size() == 1
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(results))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_continued_prefix_stays_exactly_at_flow_time_0(noise, previous, solver):
    seen = []

    def velocity(x, time):
        jax.debug.callback(lambda x, time: seen.append((np.array(x), np.array(time))), x, time)
        return walk(x, 0.5) * time[..., None]

    delays = previous._replace(delay=jnp.arange(16) % 4)
    continued, project = continue_prefix(velocity, delays)
    sample = integrate(continued, noise, make(solver, 4), project=project)
    prefix = np.asarray(is_clean(delays.delay, HORIZON))
    np.testing.assert_array_equal(sample[prefix], previous.actions[prefix])
    assert len(seen) == 4 * EVALUATIONS[solver]
    for x, time in seen:
        np.testing.assert_array_equal(x[prefix], previous.actions[prefix])
        assert (time[prefix] == 0).all()
        assert len(set(time[~prefix])) == 1
    assert np.abs(sample - noise)[~prefix].min() > 0


def test_classifier_free_guidance_may_be_continued_too(noise, previous):
    def both(x, time):
        conditional, unconditional = jnp.split(walk(x, 0.5) * time[..., None], 2)
        return jnp.concatenate([conditional + 1, unconditional])

    def sample(velocity):
        continued, project = continue_prefix(velocity, previous)
        return integrate(continued, noise, Euler(4), project=project)

    expected = sample(lambda x, t: walk(x, 0.5) * t[..., None] + 2)
    np.testing.assert_allclose(sample(classifier_free(both, 2.0)), expected, atol=1e-5)


@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize("path", [Straight(), Cosine()], ids=["straight", "cosine"])
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "v"])
def test_any_prediction_may_go_on_from_a_previous_chunk(noise, previous, predicts, path, power):
    """A prediction that is exact gives the guided flow of the velocity, whatever it is called."""
    mean, deviation = jnp.zeros((1, HORIZON, 2)), jnp.linspace(0.5, 1.5, HORIZON)[None, :, None]

    def guided(predicts, through_network):
        flow = Flow(exact_prediction(path, predicts, mean, deviation), path, predicts)
        velocity = real_time_chunking(flow.velocity, previous, path=path, through_network=through_network)
        return jax.jit(lambda x: integrate(Flow(velocity, path), x, Euler(40, power)))(noise)

    for through_network in (True, False):
        sample = guided(predicts, through_network)
        np.testing.assert_allclose(sample, guided("velocity", through_network), atol=2e-2)
        assert np.abs(sample - previous.actions)[:, :2].mean() < 0.3
