"""Couplings are what they claim, and the conditional one does not bias p(data | condition)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.coupling import Independent, OptimalTransport, Sinkhorn, assignment, sinkhorn, transport_cost
from pi0_jax.flow.loss import flow_loss, loss_mask
from pi0_jax.flow.path import Straight, interpolate
from pi0_jax.sampler import Euler, integrate
from tests.flow.toy import Field, fit


@pytest.fixture
def drawn():
    """Noise, data and conditions of six examples."""
    keys = jax.random.split(jax.random.key(0), 3)
    return *(jax.random.normal(key, (6, 2, 3)) for key in keys[:2]), jax.random.normal(keys[2], (6, 4))


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_the_assignment_is_the_cheapest_of_all_permutations(drawn, weight):
    noise, data, condition = drawn
    cost = np.asarray(transport_cost(noise, data, condition, weight))
    rows = np.asarray(jax.jit(assignment)(cost))
    cheapest = min(sum(cost[p[j], j] for j in range(6)) for p in itertools.permutations(range(6)))
    assert sorted(rows) == list(range(6))
    assert cost[rows, range(6)].sum() == pytest.approx(cheapest, rel=1e-6)


def test_the_cost_is_that_of_moving_and_of_another_condition(drawn):
    noise, data, condition = drawn
    apart = np.square(np.asarray(noise)[:, None] - np.asarray(data)[None]).mean((2, 3))
    change = np.square(np.asarray(condition)[:, None] - np.asarray(condition)[None]).sum(2)
    np.testing.assert_allclose(transport_cost(*drawn, 0.7), apart + 0.7 * change, rtol=1e-4, atol=1e-4)


def test_optimal_transport_only_reorders_and_independence_not_even_that(drawn):
    noise = np.asarray(drawn[0])
    np.testing.assert_array_equal(Independent().couple(*drawn, jax.random.key(0)), noise)
    paired = np.asarray(OptimalTransport(0.0).couple(*drawn, jax.random.key(0)))
    assert (paired != noise).any()
    np.testing.assert_array_equal(np.sort(paired.ravel()), np.sort(noise.ravel()))
    np.testing.assert_array_equal(sorted(map(tuple, paired.reshape(6, -1))), sorted(map(tuple, noise.reshape(6, -1))))


@pytest.mark.parametrize("coupling", [OptimalTransport, Sinkhorn])
def test_a_large_weight_keeps_each_noise_with_its_own_condition(drawn, coupling):
    noise, data, _ = drawn
    condition = jnp.array([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]])
    paired = np.asarray(coupling(1e4).couple(noise, data, condition, jax.random.key(0)))
    origin = [int(np.flatnonzero((np.asarray(noise) == row).all((1, 2)))[0]) for row in paired]
    assert all(i < 3 for i in origin[:3])
    assert all(i >= 3 for i in origin[3:])


@pytest.mark.parametrize("horizon", [1, 8, 50])
def test_weight_1_keeps_chunks_of_any_length_from_conditions_a_unit_away(horizon):
    keys = jax.random.split(jax.random.key(0), 3)
    condition = jax.nn.one_hot(jax.random.randint(keys[0], (32,), 0, 3), 3)
    data = condition[:, None] + 0.3 * jax.random.normal(keys[1], (32, horizon, 3))
    noise = jax.random.normal(keys[2], data.shape)
    rows = np.asarray(assignment(transport_cost(noise, data, condition, 0.0)))
    assert np.mean((condition[rows] != condition).any(1)) > 0.4
    rows = np.asarray(assignment(transport_cost(noise, data, condition, 1.0)))
    assert np.mean((condition[rows] != condition).any(1)) < (0.35 if horizon == 1 else 0.1)


def test_a_large_weight_does_not_blur_the_plan_within_a_condition():
    # Regularisation is a share of the cost of moving noise; were it one of the whole cost, pairs within a condition
    # would become random as the weight grows.
    noise = jnp.array([-2.0, 2.0, -2.0, 2.0]).reshape(4, 1, 1)
    data, condition = noise[::-1], jnp.array([[0.0], [0.0], [1.0], [1.0]])
    for key in range(5):
        paired = Sinkhorn(1e4).couple(noise, data, condition, jax.random.key(key))
        np.testing.assert_array_equal(paired, data)


def test_the_sinkhorn_plan_has_uniform_margins(drawn):
    cost = transport_cost(*drawn, 0.0)
    plan = np.exp(jax.jit(sinkhorn)(cost, 0.2 * cost.mean()))
    np.testing.assert_allclose(plan.sum(0), 1 / 6, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(1), 1 / 6, rtol=1e-3)


def test_without_entropy_the_plan_costs_what_the_assignment_costs(drawn):
    cost = transport_cost(*drawn, 0.0)
    best = float(jnp.mean(cost[assignment(cost), jnp.arange(6)]))
    run = jax.jit(lambda share: jnp.sum(jnp.exp(sinkhorn(cost, share * cost.mean(), 2000)) * cost))
    costs = [float(run(share)) for share in (1.0, 0.1, 0.003)]
    assert costs[0] > costs[1] > costs[2] - 1e-4
    assert costs[2] == pytest.approx(best, rel=1e-3)


def test_values_that_are_not_finite_do_not_stop_the_program(drawn):
    # The loss is NaN then, and the run says so.
    noise, data, condition = drawn
    for coupling in (OptimalTransport(), Sinkhorn()):
        paired = jax.jit(lambda data: coupling.couple(noise, data, condition, jax.random.key(0)))(data * jnp.nan)
        assert paired.shape == noise.shape


def right_share(coupling: OptimalTransport) -> float:
    """How often a learnt flow goes to +2 where the condition is 0; in the data it is once in five times."""
    field = Field(32)

    def loss(params, key):
        keys = jax.random.split(key, 5)
        condition = jax.random.bernoulli(keys[0], shape=(48, 1)).astype(jnp.float32)
        right = jax.random.bernoulli(keys[1], 0.2 + 0.6 * condition)
        data = jnp.where(right, 2.0, -2.0)[..., None]
        noise = jax.random.normal(keys[2], data.shape)
        noise = coupling.couple(noise, data, condition, keys[3])
        time = jax.random.uniform(keys[4], (48,))
        x, target = interpolate(Straight(), data, noise, time)
        return flow_loss(field.apply(params, x, time, condition), target, loss_mask(x.shape))

    params = field.init(jax.random.key(0), jnp.zeros((1, 1, 1)), jnp.zeros(1), jnp.zeros((1, 1)))
    params = fit(loss, params, jax.random.key(1), 500)
    noise, condition = jax.random.normal(jax.random.key(2), (1000, 1, 1)), jnp.zeros((1000, 1))
    end = jax.jit(lambda x: integrate(lambda x, t: field.apply(params, x, t, condition), x, Euler(20)))(noise)
    return float(jnp.mean(end > 0))


def test_only_the_conditional_coupling_keeps_a_conditional_law():
    assert right_share(OptimalTransport(0.0)) == pytest.approx(0.5, abs=0.1)
    assert right_share(OptimalTransport(100.0)) == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize("coupling", [OptimalTransport, Sinkhorn])
def test_only_the_plain_coupling_lets_noise_tell_the_condition(coupling):
    def noise_of_condition_0(key, weight):
        keys = jax.random.split(key, 4)
        condition = jax.random.bernoulli(keys[0], shape=(32, 1)).astype(jnp.float32)
        data = jnp.where(jax.random.bernoulli(keys[1], 0.2 + 0.6 * condition), 2.0, -2.0)
        noise = jax.random.normal(keys[2], data.shape)
        noise = coupling(weight).couple(noise, data, condition, keys[3])
        return jnp.sum(noise * (1 - condition)) / jnp.sum(1 - condition)

    keys = jax.random.split(jax.random.key(0), 60)
    # Where it is independent its mean is 0; sampling noise of that over 60 batches is 0.03.
    plain, conditional = (
        float(jnp.mean(jax.jit(jax.vmap(lambda key: noise_of_condition_0(key, weight)))(keys)))
        for weight in (0.0, 100.0)
    )
    assert plain < -0.3
    assert abs(conditional) < 0.1
