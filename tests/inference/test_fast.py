"""Rewritten weights give the numbers of the plain network, for less work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from pi0_jax import flops, pi0
from pi0_jax.config import PI0, PI05, ExpertConfig, VisionConfig
from pi0_jax.inference import rewrite
from pi0_jax.inference.fast import FastNetwork
from pi0_jax.model import attention
from pi0_jax.model.heads import make_network
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

MODELS = {
    "pi0": tiny_config("pi0"),
    "pi05": tiny_config("pi05"),
    "adapters": tiny_config(
        "pi0",
        language=ExpertConfig(24, 48, lora_attn_rank=2, lora_mlp_rank=2, lora_scale=0.7),
        action=ExpertConfig(16, 32, lora_attn_rank=2),
    ),
    "stem": tiny_config(
        "pi05",
        vision=VisionConfig(
            width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16, patch_size=8, stem_width=6, position="sincos2d"
        ),
    ),
    "no camera": tiny_config("pi0", cameras=()),
}


class Case:
    """A model with random weights, an observation of three, and what the plain network makes of them."""

    def __init__(self, config):
        self.config = config
        rng = np.random.default_rng(0)
        self.params = random_params(make_network(config), rng)
        observation = random_observation(config, 3, rng)
        masks = {name: jnp.array([True, i == 0, True]) for i, name in enumerate(config.cameras)}
        self.observation = observation._replace(image_masks=masks)
        self.noise = jnp.asarray(rng.normal(size=(3, config.action_horizon, config.action_dim)), jnp.float32)
        self.plain = self.sample(make_network(config), self.params)

    def sample(self, network, weights, **how):
        sample = functools.partial(pi0.sample_actions, network, num_steps=4, **how)
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(sample)(weights, self.observation, self.noise))

    def weights(self, **how):
        return rewrite.rewrite(self.config, rewrite.from_tree(self.params), **how)


@functools.cache
def case(name: str, dtype: str = "float32") -> Case:
    return Case(dataclasses.replace(MODELS[name], dtype=dtype))


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_plain_network(name):
    it = case(name)
    got = it.sample(FastNetwork(it.config), it.weights())
    np.testing.assert_allclose(got, it.plain, atol=1e-5)
    assert np.abs(it.plain).max() > 0.5


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_so_are_those_of_a_straight_line_program_that_looks_the_times_up(name):
    it = case(name)
    network, weights = FastNetwork(it.config), it.weights(unstacked=True)
    weights["tables"] = network.time_tables(weights, 4)
    np.testing.assert_allclose(it.sample(network, weights, unroll=True), it.plain, atol=1e-5)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_on_a_gpu_images_and_prefix_go_through_the_fused_kernel_and_nothing_else_does(name, monkeypatch):
    it, seen = case(name), []
    fused = attention.fused

    def kernel(query, *rest):
        seen.append(query.shape[1])
        return fused(query, *rest, implementation="xla")

    monkeypatch.setattr(attention, "fused", kernel)
    monkeypatch.setattr(attention, "why_not_fused", lambda dtype: None)
    config = dataclasses.replace(it.config, attention="cudnn")
    patches = (config.vision.image_size // config.vision.patch_size) ** 2
    prefix = len(config.cameras) * patches + config.prompt_length
    for network, weights in ((make_network(config), it.params), (FastNetwork(config), it.weights())):
        seen.clear()
        np.testing.assert_allclose(it.sample(network, weights), it.plain, atol=1e-5)
        assert set(seen) == {patches, prefix}


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_in_bfloat16_it_is_as_near_to_exact_numbers_as_the_plain_network(name):
    exact, it = case(name).plain, case(name, "bfloat16")
    got = it.sample(FastNetwork(it.config), it.weights())
    error, plain_error = (np.sqrt(np.mean((x - exact) ** 2)) for x in (got, it.plain))
    assert 0 < error < 1.5 * plain_error < 0.1


@pytest.mark.parametrize(("bits", "most"), [("int8", 0.03), ("fp8", 0.15)])
def test_eight_bits_change_little_and_rows_stay_on_their_own(bits, most):
    it = case("pi05")
    network, weights = FastNetwork(it.config), rewrite.quantized(it.weights(), bits)
    got = it.sample(network, weights)
    assert 0 < np.sqrt(np.mean((got - it.plain) ** 2)) < most
    alone = jax.tree.map(lambda x: x[1:2], it.observation)
    with jax.default_matmul_precision("highest"):
        sample = jax.jit(functools.partial(pi0.sample_actions, network, num_steps=4))
        np.testing.assert_allclose(sample(weights, alone, it.noise[1:2])[0], got[1], atol=1e-4)
    matrices = [x for x in jax.tree.leaves(weights) if x.dtype.itemsize == 1]
    assert sum(x.size for x in matrices) > 0.5 * sum(x.size for x in jax.tree.leaves(it.params))


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_an_eight_bit_matrix_is_within_half_a_step_of_its_own(bits):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, 7)) * [1, 1e-3, 100, 0, 1, 1, 1], jnp.float32)
    values, scale = rewrite.quantize(w, bits)
    back = values.astype(jnp.float32) * scale[..., None, :]
    # Whole numbers up to 127, or three bits of mantissa above the smallest normal number.
    step = scale[..., None, :] if bits == "int8" else jnp.maximum(jnp.abs(w) / 8, scale[..., None, :] * 2**-6)
    assert bool((jnp.abs(back - w) <= 0.501 * step).all())


@pytest.mark.parametrize("name", ["pi05", "adapters"])
@pytest.mark.parametrize("unstacked", [False, True])
def test_large_arrays_are_made_a_layer_at_a_time_and_the_same(name, unstacked, monkeypatch):
    small = case(name).weights(unstacked=unstacked)
    monkeypatch.setattr(rewrite, "_JIT_ABOVE", -1)
    large = case(name).weights(unstacked=unstacked)
    assert jax.tree.structure(small) == jax.tree.structure(large)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), small, large)


def test_every_array_of_a_checkpoint_is_used():
    for name in ("pi0", "pi05", "adapters", "stem"):
        config = MODELS[name]
        used = {path for rule in rewrite.rules(config).values() for path in rule.sources}
        # What the last language layer does after attention is not needed by anyone.
        assert set(rewrite.shapes_of(config)) - used <= {"backbone/language_norm/scale"}


@pytest.mark.parametrize(
    ("model", "bound"),
    [(PI0, 4.20), (dataclasses.replace(PI0, cameras=PI0.cameras[:2]), 2.96), (PI05, 4.81)],
    ids=["pi0", "two cameras", "pi05"],
)
def test_a_chunk_at_full_size_costs_no_more_than_it_has_to(model, bound):
    shapes, weights = rewrite.shapes_of(model), {}
    for target, rule in rewrite.rules(model).items():
        dtype = jnp.dtype("float32" if rule.exact else model.dtype)
        sources = {path: shapes[path].update(dtype="float32") for path in rule.sources}
        made = jax.eval_shape(lambda p, rule=rule: rule(p, jnp), sources)
        weights[target] = made.update(dtype=dtype)
    weights, network = unflatten_dict(weights, sep="/"), FastNetwork(model)
    weights["tables"] = jax.eval_shape(lambda w: network.time_tables(w, 10), weights)
    observation, actions, _ = pi0.example_inputs(model, batch_size=1)
    sample = functools.partial(pi0.sample_actions, network, num_steps=10)
    count = flops.count(lambda w, noise: sample(w, observation, noise), weights, actions)
    assert count / 1e12 <= bound
