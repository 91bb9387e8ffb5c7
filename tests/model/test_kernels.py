"""Kernels give the numbers of the plain layers; here they run as ordinary operations, in float32."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.config import ExpertConfig, Gaussian, RealTimeConfig
from pi0_jax.errors import UserError
from pi0_jax.flow.realtime import Previous
from pi0_jax.model import fold, kernels, layers, target
from pi0_jax.model.attention import attend, watch_attention
from pi0_jax.model.quantize import quantize_matrix
from pi0_jax.objective import SampleOptions, make_objective
from pi0_jax.pi0 import sample_actions
from pi0_jax.sampler import Euler
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

SIZES = {"action": ExpertConfig(64, 64), "head_dim": 32, "num_heads": 2, "action_horizon": 5}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.delenv(target.KERNELS, raising=False)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("b", "t", "n", "k", "h", "s"), [(2, 64, 4, 1, 32, 128), (1, 64, 4, 2, 32, 64), (2, 80, 2, 2, 24, 0)]
)
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_that_of_the_plain_form(b, t, n, k, h, s, masked):
    qkv = normal(b, t, n + 2 * k, h)
    prefix = (normal(b, s, k, h, seed=1), normal(b, s, k, h, seed=2)) if s else None
    keys, values = qkv[:, :, n : n + k], qkv[:, :, n + k :]
    if prefix:
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, (keys, values), strict=True))
    # The first block of keys is unseen by the first example, and a key of all.
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (b, t, s + t)).at[0, :, :64].set(False).at[..., -1].set(True)
    expected = attend(qkv[:, :, :n], keys, values, mask if masked else None)
    found = kernels.attention(qkv, prefix, mask.astype(jnp.int8) if masked else None, n, h**-0.5)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("adaptive", "bits"), [(False, None), (True, None), (True, "int8"), (False, "fp8")])
def test_products_are_those_of_the_plain_form(adaptive, bits):
    x, w, down = normal(2, 64, 64), normal(64, 4 * 32, seed=1) / 8, normal(32, 64, seed=2) / 6
    stored: list[Any] = [w, down] if bits is None else [quantize_matrix(y, bits) for y in (w, down)]
    if bits:
        w, down = (y.values.astype(jnp.float32) * y.scale[None] for y in stored)
    table = normal(3, 3 * 64 if adaptive else 64, seed=3)
    norm = kernels.Norm(table, 1)
    modulation = table[1] if adaptive else None
    normed, gate = layers.rms_norm(x, None if adaptive else {"factor": table[1]}, modulation)
    rotation = layers.rotation(jnp.tile(jnp.arange(64), (2, 1)), 32)
    qkv = (normed @ w).reshape(2, 64, 4, 32)
    qkv = jnp.concatenate([layers.rotate(qkv[:, :, :3], rotation), qkv[:, :, 3:]], axis=2).reshape(2, 64, -1)
    flat = (rotation[0][:, :, 0], rotation[1][:, :, 0])
    np.testing.assert_allclose(kernels.norm_qkv(x, norm, stored[0], flat, 1), qkv, atol=2e-5)
    hidden = normal(2, 64, 32, seed=4)
    product = hidden @ down * (1 if gate is None else gate)
    np.testing.assert_allclose(kernels.add_product(x, hidden, stored[1], norm), x + product, atol=2e-5)
    first, second = jnp.split(normed @ w, 2, axis=-1)
    np.testing.assert_allclose(
        kernels.norm_geglu(x, norm, stored[0]), jax.nn.gelu(first) * second, atol=2e-4, rtol=1e-5
    )


class Sampled:
    """A tiny model's chunks, and how often a kernel was called for them."""

    def __init__(self, variant: str, monkeypatch):
        self.config = tiny_config(variant, **SIZES)
        self.objective, rng = make_objective(Gaussian(), self.config), np.random.default_rng(0)
        params = random_params(self.objective.network, rng)
        self.params = fold.fold(self.objective.network, fold.from_tree(params))
        self.observation = random_observation(self.config, 2, rng)
        self.noise = jnp.asarray(rng.normal(size=(2, 5, self.config.action_dim)), jnp.float32)
        self.calls = 0
        self.plain_kernel = kernels.add_product
        monkeypatch.setattr(kernels, "add_product", self._counted)

    def _counted(self, *operands):
        self.calls += 1
        return self.plain_kernel(*operands)

    def __call__(self, where, features: bool = True, **options):
        self.calls = 0
        sampler = Euler(3)
        given = self.objective.features(self.params, sampler) if features and self.objective.features else None
        with where:
            run = jax.jit(
                lambda: sample_actions(
                    self.objective,
                    self.params,
                    self.observation,
                    self.noise,
                    SampleOptions(sampler, features=given, **options),
                )
            )
            return np.asarray(run())


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_chunks_are_the_same_on_every_platform(variant, monkeypatch):
    sampled = Sampled(variant, monkeypatch)
    plain = sampled(contextlib.nullcontext())
    assert sampled.calls == 0
    np.testing.assert_allclose(sampled(target.tracing_for("tpu")), plain, atol=1e-5)
    assert sampled.calls == 0
    np.testing.assert_allclose(sampled(target.tracing_for("gpu")), plain, atol=1e-5)
    assert sampled.calls == 2 * sampled.config.depth
    monkeypatch.setenv(target.KERNELS, "0")
    np.testing.assert_allclose(sampled(target.tracing_for("gpu")), plain, atol=1e-5)
    assert sampled.calls == 0


def test_what_is_differentiated_or_watched_has_no_kernels(monkeypatch):
    sampled = Sampled("pi0", monkeypatch)
    options = {
        "previous": Previous(sampled.noise, jnp.ones(2, jnp.int32), jnp.full(2, 4)),
        "real_time": RealTimeConfig(method="guidance"),
    }
    plain = sampled(contextlib.nullcontext(), **options)
    np.testing.assert_allclose(sampled(target.tracing_for("gpu"), **options), plain, atol=2e-5)
    assert sampled.calls == 0
    with watch_attention() as weights:
        sampled(target.tracing_for("gpu"))
    assert weights
    assert sampled.calls == 0


def test_a_program_that_fails_says_how_to_do_without_kernels():
    with pytest.raises(UserError, match=f"ptxas.*\n.*{target.KERNELS}=0"), target.tracing_for("gpu"), target.advice():
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with 1")
    with pytest.raises(UserError, match="no such load"), target.tracing_for("gpu"), target.advice():
        raise NotImplementedError("no such load")
    with pytest.raises(jax.errors.JaxRuntimeError), target.tracing_for("gpu"), target.advice():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 80 GB")
    with pytest.raises(jax.errors.JaxRuntimeError), target.tracing_for("tpu"), target.advice():
        raise jax.errors.JaxRuntimeError("INTERNAL: other")
