"""Moments and averages in fewer bits stay what they are on average, and train as those in float32 do."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import meta

from pi0_jax.config import MeshConfig, OptimConfig
from pi0_jax.training import low_precision, sharding
from pi0_jax.training.low_precision import BLOCK, Coded, average, decode, encode, round_at_random, scale_by_adam_8bit
from pi0_jax.training.optimizer import make_optimizer
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.training.common import OPTIM, harness


def spread(shape: tuple[int, ...], seed=0) -> jax.Array:
    """Numbers over many orders of magnitude."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal(shape) * 10.0 ** random.uniform(-4, 0, shape), jnp.float32)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("shape", "scales"), [((3, 8, 600), (3, 8, 3)), ((5, 1100, 16), (5, 5, 16)), ((64, 72), (64, 1))]
)
def test_codes_are_within_their_spacing_and_scales_are_the_blocks_largest(shape, scales, signed):
    x = spread(shape) if signed else jnp.abs(spread(shape))
    coded = encode(x, jax.random.key(0), signed=signed)
    assert isinstance(coded, Coded)
    assert coded.codes.shape == shape
    assert coded.scales.shape == scales
    assert coded.codes.dtype == (jnp.int8 if signed else jnp.uint8)
    axis = int(np.argmax(np.array(shape) != np.array(scales)))
    largest = np.repeat(coded.scales, min(BLOCK, shape[axis]), axis=axis)
    largest = np.take(largest, range(shape[axis]), axis=axis)
    y = np.asarray(decode(coded, signed=signed))
    # Between two neighbours: a tenth of a power of ten has one value to jump at the bottom, 64 (128) at the top.
    assert np.all(np.abs(y - x) <= 0.9 * np.maximum(np.abs(x), np.abs(y)) + 1e-6 * largest)
    top = np.abs(x) > 0.2 * largest
    assert np.all(np.abs(y - x)[top] <= (0.9 / (64 if signed else 128)) * largest[top] * 1.001)
    exact = np.abs(x) == largest
    np.testing.assert_allclose(y[exact], x[exact], rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_worth_itself_and_numbers_between_them_are_right_on_average(signed):
    x = spread((16, 256)) if signed else np.abs(spread((16, 256)))
    code = jax.jit(functools.partial(encode, signed=signed))
    coded = code(x, jax.random.key(0))
    values = decode(coded, signed=signed)
    again = decode(code(values, jax.random.key(1)), signed=signed)
    np.testing.assert_allclose(again, values, rtol=0.02)
    draws = jax.vmap(lambda key: decode(code(x, key), signed=signed))(jax.random.split(jax.random.key(2), 400))
    error = (np.mean(draws, 0) - x) / np.maximum(np.std(draws, 0) / 20, 1e-7 * np.abs(x).max())
    assert np.abs(error).mean() < 1.2  # 0.8 of a normal distribution
    assert np.abs(np.mean(error)) < 0.1


def test_no_second_moment_but_zero_becomes_zero():
    x = jnp.zeros((16, 256)).at[0, 0].set(1.0).at[0, 1].set(1e-30)
    y = decode(encode(x, jax.random.key(0), signed=False), signed=False)
    assert y[0, 1] > 0
    assert np.count_nonzero(y) == 2


def test_small_arrays_are_not_coded():
    x = jnp.ones((8, 8))
    assert encode(x, jax.random.key(0), signed=True) is x


def test_8bit_adam_follows_adam_on_a_quadratic():
    curvature = 10.0 ** jnp.linspace(-2, 1, 8192).reshape(32, 256)
    start = jnp.asarray(spread((32, 256)))

    def losses(transform):
        transform = optax.chain(transform, optax.scale(-1e-2))

        @jax.jit
        def step(carry, _):
            x, state = carry
            value, gradient = jax.value_and_grad(lambda x: 0.5 * jnp.sum(curvature * (x - 1) ** 2))(x)
            change, state = transform.update(gradient, state)
            return (x + change, state), value

        return jax.lax.scan(step, (start, transform.init(start)), length=200)[1]

    ours, adam = losses(scale_by_adam_8bit(0.9, 0.95, 1e-8)), losses(optax.scale_by_adam(0.9, 0.95, 1e-8))
    np.testing.assert_allclose(ours[::20], adam[::20], rtol=0.05)
    assert ours[-1] < 5e-3 * ours[0]


def test_a_bfloat16_average_gets_where_rounding_to_nearest_would_not():
    params = {"w": jnp.full((64, 64), 1.01), "inf": jnp.array([jnp.inf, -jnp.inf])}
    ema = {"w": jnp.ones((64, 64), jnp.bfloat16), "inf": jnp.array([jnp.inf, -jnp.inf], jnp.bfloat16)}
    step = jax.jit(lambda ema, key: average(ema, params, 0.99, key))
    for number in range(300):
        ema = step(ema, jax.random.key(number))
    assert ema["w"].dtype == jnp.bfloat16
    assert jnp.mean(ema["w"].astype(jnp.float32)) == pytest.approx(1 + 0.01 * (1 - 0.99**300), abs=2e-4)
    assert jnp.isinf(ema["inf"]).all()
    nearest = jnp.bfloat16(0.99 * 1.0 + 0.01 * 1.01)
    assert nearest == 1.0


def test_random_rounding_is_right_on_average_and_keeps_what_is_exact():
    x = jnp.asarray(spread((4096,)))
    drawn = jax.vmap(lambda key: round_at_random(x, key).astype(jnp.float32))(jax.random.split(jax.random.key(0), 256))
    assert np.all(np.abs(np.asarray(drawn) - np.asarray(x)) <= 2.0**-7 * np.abs(np.asarray(x)))
    np.testing.assert_allclose(np.mean(drawn, 0), x, rtol=2.0**-7 * 5 / 16 / 2)
    exact = x.astype(jnp.bfloat16)
    assert np.array_equal(round_at_random(exact.astype(jnp.float32), jax.random.key(1)), exact)


def test_8bit_moments_train_a_tiny_policy_as_those_of_adam_do(monkeypatch):
    monkeypatch.setattr(low_precision, "SMALLEST", 64)
    blind = tiny_config("pi0", cameras=())
    batches = [random_batch(blind, 4, seed % 2) for seed in range(40)]
    losses, held = {}, {}
    for name in ("adamw", "adamw_8bit"):
        one = harness(blind, optim=dataclasses.replace(OPTIM, name=name))
        state, rows = one.run(one.start(), batches)
        losses[name] = np.array([row["loss"] for row in rows])
        held[name] = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    assert held["adamw_8bit"] < 0.4 * held["adamw"]
    fallen = {name: x[:5].mean() - x[-5:].mean() for name, x in losses.items()}
    assert fallen["adamw"] > 0.3
    assert fallen["adamw_8bit"] == pytest.approx(fallen["adamw"], rel=0.1)


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor"])
def test_small_states_are_divided_over_devices_and_give_the_same_updates(name):
    # Blocks and divisions are those of larger arrays; Adafactor's rows and columns weigh little in large ones alone.
    layers, heads, mlp = (1, 2, 128) if name == "adamw_8bit" else (2, 4, 512)
    boxed = {
        "q": nn.LogicallyPartitioned(spread((layers, 1024, heads, 128)), ("layers", "embed", "heads", "head_dim")),
        "down": nn.LogicallyPartitioned(spread((mlp, 2048)), ("mlp", "embed")),
        "norm": nn.LogicallyPartitioned(spread((64,)), ("embed",)),
    }
    transform = make_optimizer(OptimConfig(name=name, b1=0.0 if name == "adafactor" else 0.9), lambda _: 1.0, boxed)
    found = []
    for mesh in (MeshConfig(), MeshConfig(data=1, fsdp=4, tensor=2)):
        devices = sharding.make_mesh(mesh, jax.devices()[: 8 if mesh.fsdp > 1 else 1])
        placement = [sharding.shardings(devices, tree) for tree in (boxed, jax.eval_shape(transform.init, boxed))]
        params = jax.device_put(meta.unbox(boxed), placement[0])
        state = jax.jit(transform.init, out_shardings=placement[1])(params)
        update = jax.jit(transform.update, out_shardings=tuple(placement))
        for _ in range(2):
            change, state = update(params, state, params)
        found.append((change, sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))))
    count = sum(x.size for x in jax.tree.leaves(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found[0][0], found[1][0])
    most = {"adamw_8bit": 2 * (1 + 4 / 128) * count, "adafactor": 0.025 * count}[name]
    assert found[0][1] <= most
    assert found[1][1] <= (most / 8 if name == "adamw_8bit" else most) + 1024
