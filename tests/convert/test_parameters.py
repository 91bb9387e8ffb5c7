"""Models come back from the shapes of their tensors, in every layout, and the probe tells all fields apart."""

import collections
import dataclasses

import numpy as np
import pytest

from pi0_jax.config import PI0, PI05, VisionConfig
from pi0_jax.convert.formats import openpi, openpi_torch
from pi0_jax.convert.lazy import LazyArray
from pi0_jax.convert.parameters import _PATCHES, _PROBE, infer_model, parameters, replaced
from tests.conftest import tiny_config
from tests.convert.common import tiny_model

MODELS = {
    "pi0": tiny_model("pi0"),
    "pi05": tiny_model("pi05"),
    "pi0_fast": tiny_model("pi0_fast"),
    "lora": tiny_model("pi0_lora"),
    "two key/value heads": dataclasses.replace(tiny_model("pi0"), num_kv_heads=2),
    "released pi0": PI0,
    "released pi05": PI05,
}


def tensors_of(rules, model):
    """Tensors with the right shapes and nothing in them."""
    declared = parameters(model)
    return {
        name: LazyArray(rule.shape(declared[rule.ours]), np.dtype(np.float32), lambda i: np.zeros(0))
        for rule in rules
        if rule.ours in declared
        for name, *_ in rule.tensors(declared[rule.ours])
    }


@pytest.mark.parametrize("layout", [openpi, openpi_torch])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_the_shapes_of_its_tensors(name, layout):
    model = MODELS[name]
    if name == "lora" and layout is openpi_torch:
        pytest.skip("PyTorch has no adapters of openpi's form")
    heads = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "vision.num_heads": model.vision.num_heads,
    }
    tensors = tensors_of(layout.rules(model.variant), model)
    not_shown = ("cameras", "action_horizon", "prompt_length", "dtype", "remat")
    guess = replaced(layout.guess_model(tensors), {field: getattr(model, field) for field in not_shown})
    scale = model.language.lora_scale
    guess = replaced(guess, {"language.lora_scale": scale, "action.lora_scale": scale})
    if name == "pi0_fast":
        guess = replaced(guess, {"action": model.action, "action_dim": model.action_dim})
    found = infer_model(layout.rules(model.variant), tensors, guess, {} if layout is openpi else heads)
    assert found == model


def test_no_two_fields_of_the_probe_have_one_size():
    probe = replaced(tiny_model("pi0_lora"), _PROBE)
    counts = collections.Counter(_PROBE.values())
    assert max(counts.values()) == 1
    sizes = {size for parameter in parameters(probe).values() for size in parameter.shape}
    fields = set(_PROBE.values()) - {_PROBE["vision.image_size"]}
    assert sizes - fields == {1, 2, 3, 26, 88, _PATCHES}  # pairs, colours, head dim, the time's input: no fields


def test_axes_go_by_the_networks_names_and_else_by_their_place():
    found = parameters(tiny_model("pi05"))
    assert found["backbone/layers/action/attn/q"].axes == ("layers", "embed", "heads", "head_dim")
    assert found["image_encoder/patch_embedding/kernel"].axes == ("axis0", "axis1", "axis2", "embed")
    assert "action_in/kernel" not in parameters(tiny_model("pi0_fast"))
    stem = VisionConfig(16, 2, 32, 2, 16, 8, stem_width=8, stem_stride=4, position="sincos2d")
    assert "image_encoder/stem/kernel" in parameters(tiny_config(vision=stem))
