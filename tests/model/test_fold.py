"""Folded parameters give the numbers of the plain ones, for less work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax import flops
from pi0_jax.batch import example_batch
from pi0_jax.config import PI0, PI05, Compact, ExpertConfig, Gaussian, Shortcut, Tokens, VisionConfig
from pi0_jax.model import attention, fold, layers
from pi0_jax.model.quantize import quantize, quantize_matrix
from pi0_jax.model.target import tracing_for
from pi0_jax.objective import SampleOptions, make_objective
from pi0_jax.pi0 import sample_actions
from pi0_jax.sampler import Euler, Greedy
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

LORA = {
    "language": ExpertConfig(24, 48, lora_attn_rank=2, lora_mlp_rank=2, lora_scale=0.7),
    "action": ExpertConfig(16, 32, lora_attn_rank=2),
}
STEM = VisionConfig(
    width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16, patch_size=8, stem_width=6, position="sincos2d"
)
COMPACT = Compact(width=32, depth=2, time_width=16, pooling="attention", conditioning="adaln")
SEQUENCE = Tokens(bins=6, dims=3, order="autoregressive")
MODELS = {
    "pi0": (tiny_config("pi0"), Gaussian()),
    "pi05": (tiny_config("pi05"), Gaussian()),
    "lora": (tiny_config("pi0", **LORA), Gaussian()),
    "stem": (tiny_config("pi05", vision=STEM), Gaussian()),
    "no camera": (tiny_config("pi0", cameras=()), Gaussian()),
    "span": (tiny_config("pi0"), Shortcut()),
    "span pi05": (tiny_config("pi05"), Shortcut()),
    "compact": (tiny_config("pi0", head=COMPACT), Gaussian()),
    "tokens": (tiny_config("pi0"), SEQUENCE),
    "tokens pi05": (tiny_config("pi05"), dataclasses.replace(SEQUENCE, order="parallel")),
}


class Case:
    """A model with random parameters, an observation of three, and the actions that its plain parameters give."""

    def __init__(self, config, objective):
        self.config, self.objective = config, make_objective(objective, config)
        self.network, rng = self.objective.network, np.random.default_rng(0)
        self.params = random_params(self.network, rng)
        observation = random_observation(config, 3, rng)
        masks = {name: jnp.array([True, i == 0, True]) for i, name in enumerate(config.cameras)}
        self.observation = observation._replace(image_masks=masks)
        self.noise = jnp.asarray(rng.normal(size=(3, config.action_horizon, config.action_dim)), jnp.float32)
        self.plain = self.sample(self.params)

    def sample(self, params, features: bool = False, config=None, rows=slice(None)):
        objective = self.objective if config is None else make_objective(Gaussian(), config)
        sampler = Euler(4) if objective.flow else Greedy()

        def sample(params, observation, noise):
            known = objective.features(params, sampler) if features else None
            return sample_actions(objective, params, observation, noise, SampleOptions(sampler, features=known))

        with jax.default_matmul_precision("highest"):
            observation = jax.tree.map(lambda x: x[rows], self.observation)
            return np.asarray(jax.jit(sample)(params, observation, self.noise[rows]))

    def folded(self):
        return fold.fold(self.network, fold.from_tree(self.params))


@functools.cache
def case(name: str, dtype: str = "float32") -> Case:
    config, objective = MODELS[name]
    return Case(dataclasses.replace(config, dtype=dtype), objective)


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_plain_parameters(name):
    it = case(name)
    np.testing.assert_allclose(it.sample(it.folded()), it.plain, atol=1e-5)
    assert np.abs(it.plain).max() > 0.5


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_the_forms_for_tpus_give_the_same_samples(name, monkeypatch):
    monkeypatch.setattr(layers, "TPU_MANY_ROWS", 16)
    it = case(name)
    with tracing_for("tpu"):
        np.testing.assert_allclose(it.sample(it.folded(), features=True), it.plain, atol=1e-5)


@pytest.mark.parametrize("name", ["pi0", "pi05", "span", "span pi05", "compact"])
@pytest.mark.parametrize("folded", [True, False])
def test_features_of_the_times_computed_beforehand_change_nothing(name, folded):
    it = case(name)
    np.testing.assert_allclose(it.sample(it.folded() if folded else it.params, features=True), it.plain, atol=1e-5)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_on_a_gpu_images_and_prefix_go_through_the_fused_kernel_alone(name, monkeypatch):
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
    for params in (it.params, it.folded()):
        seen.clear()
        np.testing.assert_allclose(it.sample(params, config=config), it.plain, atol=1e-5)
        assert set(seen) == {patches, prefix}


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_in_bfloat16_they_are_as_near_to_exact_numbers_as_plain_ones(name):
    exact, it = case(name).plain, case(name, "bfloat16")
    error, plain_error = (np.sqrt(np.mean((x - exact) ** 2)) for x in (it.sample(it.folded()), it.plain))
    assert 0 < error < 1.5 * plain_error < 0.1


@pytest.mark.parametrize(("bits", "most"), [("int8", 0.03), ("fp8", 0.15)])
def test_eight_bits_change_little_and_rows_stay_on_their_own(bits, most):
    it = case("pi05")
    params = quantize(it.folded(), bits)
    actions = it.sample(params)
    assert 0 < np.sqrt(np.mean((actions - it.plain) ** 2)) < most
    np.testing.assert_allclose(it.sample(params, rows=slice(1, 2))[0], actions[1], atol=1e-4)
    matrices = [x for x in jax.tree.leaves(params) if x.dtype.itemsize == 1]
    assert sum(x.size for x in matrices) > 0.5 * sum(x.size for x in jax.tree.leaves(it.params))


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_an_eight_bit_matrix_is_within_half_a_step_of_its_own(bits):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(40, 7)) * [1, 1e-3, 100, 0, 1, 1, 1], jnp.float32)
    values, scale = quantize_matrix(w, bits)
    scale = scale[None]
    back = values.astype(jnp.float32) * scale
    # Whole numbers up to 127, or three bits of mantissa above the smallest normal number.
    step = scale if bits == "int8" else jnp.maximum(jnp.abs(w) / 8, scale * 2**-6)
    assert bool((jnp.abs(back - w) <= 0.501 * step).all())


@pytest.mark.parametrize("name", ["pi05", "lora"])
def test_large_arrays_are_made_by_compiled_programs_and_the_same(name, monkeypatch):
    small = case(name).folded()
    monkeypatch.setattr(fold, "_JIT_ABOVE", -1)
    large = case(name).folded()
    assert jax.tree.structure(small) == jax.tree.structure(large)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), small, large)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_known_without_arrays_and_every_parameter_is_used(name):
    it = case(name)
    folded = it.folded()
    shapes = fold.folded_shapes(it.network)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), folded)
    used = {path for rule in fold.rules(it.network).values() for path in rule.sources}
    # The actions see keys and values of the last language layer, not its outputs.
    assert set(fold.shapes_of(it.network)) - used <= {"backbone/language_norm/scale"}


@pytest.mark.parametrize(
    ("model", "bound"),
    [(PI0, 4.20), (dataclasses.replace(PI0, cameras=PI0.cameras[:2]), 2.96), (PI05, 4.81)],
    ids=["pi0", "two cameras", "pi05"],
)
def test_a_chunk_at_full_size_costs_no_more_than_it_has_to(model, bound):
    objective, sampler = make_objective(Gaussian(), model), Euler(10)
    batch = example_batch(model, 1)

    def sample(params, noise):
        options = SampleOptions(sampler, features=objective.features(params, sampler))
        return sample_actions(objective, params, batch.observation, noise, options)

    assert flops.count(sample, fold.folded_shapes(objective.network), batch.actions) / 1e12 <= bound


def test_what_fails_while_reading_is_raised():
    network = make_objective(Gaussian(), tiny_config("pi0", depth=1)).network
    read = fold.from_tree(random_params(network, np.random.default_rng(0)))

    def damaged(wanted):
        if "embedding" in wanted:
            raise OSError("the embedding cannot be read")
        return read(wanted)

    with pytest.raises(OSError, match="the embedding cannot be read"):
        fold.fold(network, damaged)


def test_a_model_of_one_layer_folds():
    network = make_objective(Gaussian(), tiny_config("pi0", depth=1)).network
    params = random_params(network, np.random.default_rng(0))
    folded = fold.fold(network, fold.from_tree(params))
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, fold.folded_shapes(network))
