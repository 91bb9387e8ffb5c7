"""Straightness is 0 on a straight path, and reflow lowers it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.loss import flow_loss, loss_mask
from pi0_jax.flow.path import Straight, interpolate
from pi0_jax.flow.straightness import straightness
from pi0_jax.sampler import Euler, trajectory
from tests.flow.toy import Field, fit


def test_a_straight_path_run_at_constant_speed_has_straightness_0():
    start, end = jax.random.normal(jax.random.key(0), (2, 1, 3, 4, 5))
    times = jnp.linspace(0, 1, 9)[:, None, None, None]
    assert float(straightness(start + times * (end - start))) < 1e-10
    assert float(straightness(start + times**2 * (end - start))) > 0.1


def test_straightness_approaches_its_integral():
    # x = t², so the speed is 2t and ∫ (2t − 1)² dt = 1/3.
    points = jnp.square(jnp.linspace(0, 1, 201))[:, None, None]
    assert float(straightness(points)) == pytest.approx(1 / 3, rel=1e-3)


def test_reflow_straightens_and_makes_one_step_nearly_enough():
    field = Field(32)

    def loss(pairs):
        def of(params, key):
            pair_key, time_key = jax.random.split(key)
            data, noise = pairs(pair_key)
            time = jax.random.uniform(time_key, (256,))
            x, target = interpolate(Straight(), data, noise, time)
            return flow_loss(field.apply(params, x, time), target, loss_mask(x.shape))

        return of

    def independent(key):
        right, noise = jax.random.split(key)
        data = jnp.where(jax.random.bernoulli(right, shape=(256, 1, 1)), 2.0, -2.0)
        return data, jax.random.normal(noise, data.shape)

    params = field.init(jax.random.key(0), jnp.zeros((1, 1, 1)), jnp.zeros(1))
    teacher = fit(loss(independent), params, jax.random.key(1), 600)

    @functools.partial(jax.jit, static_argnums=2)
    def sample(params, noise, num_steps):
        return trajectory(functools.partial(field.apply, params), noise, Euler(num_steps))

    noise = jax.random.normal(jax.random.key(2), (4096, 1, 1))
    made = sample(teacher, noise, 40)[-1]

    def pairs_of_teacher(key):
        rows = jax.random.randint(key, (256,), 0, len(noise))
        return made[rows], noise[rows]

    student = fit(loss(pairs_of_teacher), teacher, jax.random.key(3), 600)
    fresh = jax.random.normal(jax.random.key(4), (1000, 1, 1))
    bent, straight, miss, near = [], [], [], []
    for params, bends, misses in ((teacher, bent, miss), (student, straight, near)):
        points = sample(params, fresh, 40)
        bends.append(float(straightness(points)))
        misses.append(float(jnp.mean(jnp.square(sample(params, fresh, 1)[-1] - points[-1]))))
    assert straight[0] < bent[0] / 4
    assert near[0] < miss[0] / 4
    # It still goes to both sides, about as often.
    assert float(jnp.mean(sample(student, fresh, 1)[-1] > 0)) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_allclose(jnp.abs(sample(student, fresh, 40)[-1]).mean(), 2.0, atol=0.3)
