"""Initial values are those that linen's own modules gave, on which runs of older versions were trained."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.config import Compact, ExpertConfig, Tokens, VisionConfig
from pi0_jax.model.head import make_head, make_tokens
from tests.conftest import tiny_config

TINY = {"cameras": ("top", "wrist"), "action_dim": 4, "action_horizon": 3, "prompt_length": 5}
VISION = VisionConfig(width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16, patch_size=8)
MODELS = {
    "pi0": {},
    "pi05": {"variant": "pi05"},
    "lora": {
        "language": ExpertConfig(24, 48, lora_attn_rank=2, lora_mlp_rank=3, lora_scale=0.7),
        "action": ExpertConfig(16, 32, lora_attn_rank=2),
    },
    "stem": {"vision": dataclasses.replace(VISION, stem_width=6, position="sincos2d")},
    "compact": {"head": Compact(width=16, depth=2, time_width=8, pooling="attention", conditioning="adaln")},
    "autoregressive": {},
}
SUMS = json.loads((Path(__file__).parents[1] / "goldens" / "initial_values.json").read_text())
"""Sums of absolute initial values by path, of version 1, whose layers were linen modules."""


def network(name: str):
    model = tiny_config(**TINY | MODELS[name])
    return make_tokens(model, Tokens(bins=8, dims=3, order=name)) if name == "autoregressive" else make_head(model)


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_are_those_of_linens_modules(name):
    params = flatten_dict(nn.meta.unbox(network(name).init(jax.random.key(7))), sep="/")
    sums = {path: float(np.abs(x).sum(dtype=np.float64)) for path, x in params.items()}
    assert sums.keys() == SUMS[name].keys()
    for path, expected in SUMS[name].items():
        np.testing.assert_allclose(sums[path], expected, rtol=1e-6, err_msg=path)
