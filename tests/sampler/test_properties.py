"""Whatever the shapes, types, step counts and masks: finite, of the type that went in, and compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_jax.flow.guidance import classifier_free
from pi0_jax.flow.loss import flow_loss, loss_mask
from pi0_jax.flow.path import Cosine
from pi0_jax.sampler import Euler, Flow, integrate
from pi0_jax.sampler.ddim import DDIM
from tests.sampler.solvers import SOLVERS, make

SHAPES = st.sampled_from([(1, 1, 1), (3, 2, 5), (2, 3, 4, 2)])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
few = settings(max_examples=12, deadline=None)


def velocity(x, time):
    # Computes in float32, as networks do.
    return jnp.sin(x.astype(jnp.float32)) - time


@functools.cache
def program(kind: str, num_steps: int):
    """A jitted sampler, and the list that grows when it is traced."""
    traced = []

    def run(x, scale):
        traced.append(x.shape)
        field = classifier_free(velocity, scale)
        if kind in ("noise", "v"):
            return integrate(Flow(field, Cosine(), kind), x, DDIM(num_steps))  # pyright: ignore
        solver, _, power = kind.partition(" ")
        return integrate(field, x, make(solver, num_steps, float(power or 1)))

    return jax.jit(run), traced


@few
@given(SHAPES, DTYPES, st.sampled_from([*SOLVERS, "Euler 2", "RK4 2", "noise", "v"]), st.integers(1, 5))
def test_samplers_keep_shape_and_type_stay_finite_and_compile_once(shape, dtype, kind, num_steps):
    run, traced = program(kind, num_steps)
    x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    first = run(x, 1.5)
    before = len(traced)
    second = run(x + 1, 0.5)
    assert len(traced) == before
    for result in (first, second):
        assert result.shape == shape
        assert result.dtype == x.dtype
        assert bool(jnp.isfinite(result.astype(jnp.float32)).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_every_type(solver, dtype):
    x = jnp.ones((1, 2, 1), dtype)
    assert integrate(velocity, x, make(solver, 2)).dtype == x.dtype


@functools.cache
def masked_loss():
    return jax.jit(jax.value_and_grad(flow_loss))


@few
@given(st.sampled_from([(1, 1, 1), (2, 3, 4)]), DTYPES, st.integers(0, 2**30), st.floats(0, 1))
def test_the_loss_is_finite_and_masked_entries_have_no_gradient(shape, dtype, seed, share):
    random = np.random.default_rng(seed)
    predicted, target = (jnp.asarray(random.normal(size=shape), dtype) for _ in range(2))
    steps, dims = random.random(shape[:2]) < share, random.random((shape[0], shape[2])) < share
    mask = loss_mask(shape, jnp.asarray(steps), jnp.asarray(dims))
    value, gradient = masked_loss()(predicted, target, mask)
    assert value.dtype == jnp.float32
    assert gradient.dtype == predicted.dtype
    assert np.isfinite(float(value))
    counted = steps[..., None] & dims[:, None]
    np.testing.assert_array_equal(np.asarray(gradient.astype(jnp.float32))[~counted], 0)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_another_step_count_is_another_program_and_the_same_is_not(num_steps):
    run = jax.jit(lambda x, solver: integrate(velocity, x, solver), static_argnums=1)
    for n in (num_steps, num_steps + 1, num_steps):
        run(jnp.ones((1, 1, 1)), Euler(n))
    assert run._cache_size() == 2
