"""Merged adapters compute what separate ones do, and a widened model gives the old outputs on old inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pi0_jax.batch import Observation
from pi0_jax.config import PolicyConfig
from pi0_jax.convert.change import grow, merge_lora
from pi0_jax.convert.commands import Convert, convert
from pi0_jax.convert.formats import Overrides, open_checkpoint, params_of
from pi0_jax.convert.lazy import in_memory, read_all
from pi0_jax.inference.policy import Policy
from pi0_jax.objective import SampleOptions, make_objective
from pi0_jax.sampler import Euler
from tests.convert.common import tiny_weights
from tests.policies import MODEL, save_tiny_checkpoint


def observation(model, seed=0) -> Observation:
    rng, size = np.random.default_rng(seed), model.vision.image_size
    return Observation(
        images={c: jnp.asarray(rng.uniform(-1, 1, (2, size, size, 3)), jnp.float32) for c in ("top", "tool")},
        image_masks={c: jnp.array([True, c == "top"]) for c in ("top", "tool")},
        state=jnp.asarray(rng.normal(size=(2, 5)), jnp.float32),
        prompt=jnp.asarray(rng.integers(3, 40, (2, 7)), jnp.int32),
        prompt_mask=jnp.arange(7)[None] < jnp.array([[7], [4]]),
    )


def make(weights):
    """The objective, and the weights as parameters."""
    policy = weights.policy
    return make_objective(policy.objective, policy.model), jax.tree.map(jnp.asarray, params_of(weights))


def samples(weights, inputs, noise):
    objective, params = make(weights)
    options = SampleOptions(Euler(3))
    return np.asarray(jax.jit(lambda *args: objective.sample(*args, options))(params, inputs, noise))


def test_merged_adapters_compute_what_separate_ones_do():
    weights = tiny_weights("pi0_lora")
    merged = merge_lora(weights)
    assert not any("lora" in path for path in merged.tensors)
    assert merged.policy.model.action.lora_attn_rank == 0
    inputs = observation(weights.policy.model)
    x, time = jax.random.normal(jax.random.key(0), (2, 6, 5)), jnp.array([0.3, 0.8])

    def velocity(weights):
        objective, params = make(weights)
        return np.asarray(jax.jit(objective.network.joint)(params, inputs, x, time))

    expected, plain = velocity(weights), velocity(without_adapters(weights))
    np.testing.assert_allclose(velocity(merged), expected, rtol=2e-5, atol=2e-5)
    assert np.abs(plain - expected).max() > 0.01  # adapters that do nothing would pass too


def without_adapters(weights):
    zero = {p: in_memory(np.zeros(t.shape, t.dtype)) for p, t in weights.tensors.items() if p.endswith("_lora_b")}
    return merge_lora(weights._replace(tensors={**weights.tensors, **zero}))


def test_merging_keeps_the_weights_dtype():
    weights = merge_lora(tiny_weights("pi0_lora", ml_dtypes.bfloat16))
    assert {array.dtype for array in read_all(weights.tensors).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_adapters_in_float32_are_not_rounded_into_frozen_bfloat16_weights():
    half, full = (tiny_weights("pi0_lora", dtype) for dtype in (ml_dtypes.bfloat16, np.float32))
    adapters = {path: tensor for path, tensor in full.tensors.items() if "_lora_" in path}
    merged = merge_lora(half._replace(tensors=half.tensors | adapters)).tensors
    path = "backbone/layers/action/mlp/down"
    a, b = (adapters[f"{path}_lora_{end}"].read(None) for end in "ab")
    assert merged[path].dtype == merged[path].read(0).dtype == np.float32
    assert merged["embedding"].dtype == ml_dtypes.bfloat16
    expected = half.tensors[path].read(None).astype(np.float32) + a @ b
    np.testing.assert_allclose(merged[path].read(None), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_a_widened_model_gives_the_same_actions_on_old_inputs(variant):
    weights = tiny_weights(variant)
    overrides = Overrides(action_dim=9, cameras=("top", "tool", "wrist"), prompt_length=11)
    wide = grow(weights, overrides)
    assert wide.policy.model == dataclasses.replace(
        weights.policy.model, action_dim=9, cameras=("top", "tool", "wrist"), prompt_length=11
    )
    inputs = observation(weights.policy.model)
    noise = jax.random.normal(jax.random.key(0), (2, 6, 5))
    more = jax.random.normal(jax.random.key(1), (2, 6, 4))
    old = Observation(
        images={**inputs.images, "wrist": jnp.ones_like(inputs.images["top"])},
        image_masks={**inputs.image_masks, "wrist": jnp.zeros(2, bool)},
        state=jnp.pad(inputs.state, ((0, 0), (0, 4))),
        prompt=jnp.pad(inputs.prompt, ((0, 0), (0, 4))),
        prompt_mask=jnp.pad(inputs.prompt_mask, ((0, 0), (0, 4))),
    )
    expected = samples(weights, inputs, noise)
    for tail in (jnp.zeros_like(more), more):  # whatever noise is in the new dimensions
        found = samples(wide, old, jnp.concatenate([noise, tail], axis=-1))
        np.testing.assert_allclose(found[..., :5], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[..., 5:], tail)


def test_widening_by_action_dimension_alone_is_exact_in_the_weights():
    weights = tiny_weights("pi0")
    wide = read_all(grow(weights, Overrides(action_dim=9)).tensors)
    for path, array in read_all(weights.tensors).items():
        corner = wide[path][tuple(slice(size) for size in array.shape)]
        assert np.array_equal(corner, array), path
        assert np.count_nonzero(wide[path]) == np.count_nonzero(array), path
    assert wide["action_in/kernel"].shape == (9, 14)
    assert wide["action_out/bias"].shape == (9,)


def test_another_horizon_changes_no_weight():
    weights = tiny_weights("pi05")
    longer = grow(weights, Overrides(horizon=20))
    assert longer.policy.model.action_horizon == 20
    assert longer.tensors == weights.tensors


def test_fewer_action_dimensions_are_refused():
    with pytest.raises(ValueError, match="trained rows are not thrown away"):
        grow(tiny_weights("pi0"), Overrides(action_dim=4))


def test_a_policy_that_does_not_see_its_state_is_told_so(tmp_path):
    model = dataclasses.replace(MODEL, variant="pi05", prompt_length=64)
    seeing = PolicyConfig(model=model, robot="tabletop", normalization="quantile")
    save_tiny_checkpoint(tmp_path / "run", policy=seeing)
    assert open_checkpoint(tmp_path / "run").policy.state_in_prompt
    convert(Convert(str(tmp_path / "run"), str(tmp_path / "blind"), overrides=Overrides(state_in_prompt=False)))
    blind = Policy.load(tmp_path / "blind")
    assert not blind.config.state_in_prompt
    seen = [blind._transform.forward({**blind.robot.example(), "state": np.full(6, x)}) for x in (0.0, 0.1)]
    np.testing.assert_array_equal(seen[0]["prompt"], seen[1]["prompt"])
