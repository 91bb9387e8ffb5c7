import flax.linen as nn
import jax
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.config import PI0, PI05, VisionConfig
from pi0_jax.convert.leaves import groups, leaves, model_of, shape_of, sizes
from pi0_jax.model.velocity import VelocityNetwork
from pi0_jax.pi0 import init_params
from tests.conftest import tiny_config
from tests.convert.common import tiny_model

MODELS = {
    "pi0": tiny_model("pi0"),
    "pi05": tiny_model("pi05"),
    "lora": tiny_model("pi0_lora"),
    "stem": tiny_config(
        vision=VisionConfig(16, 2, 32, 2, 16, 8, stem_width=8, stem_stride=4, position="sincos2d"), num_kv_heads=2
    ),
    "released pi0": PI0,
    "released pi05": PI05,
}


@pytest.mark.parametrize("name", MODELS)
def test_leaves_are_the_networks_own_parameters(name):
    model = MODELS[name]
    made = nn.meta.unbox(jax.eval_shape(lambda: init_params(VelocityNetwork(model), jax.random.key(0))))
    letters = sizes(model)
    described = {path: shape_of(axes, letters) for path, axes in leaves(model).items()}
    assert described == {path: leaf.shape for path, leaf in flatten_dict(made, sep="/").items()}


@pytest.mark.parametrize("name", ["pi0", "pi05", "lora", "released pi0", "released pi05"])
def test_a_model_comes_back_from_its_sizes(name):
    model = MODELS[name]
    assert model_of(sizes(model), tiny_config(model.variant)).language == model.language or name == "lora"
    assert model_of(sizes(model), model) == model


def test_axes_in_brackets_are_one():
    assert groups("l (n h) d") == [["l"], ["n", "h"], ["d"]]
    assert shape_of("1 (n h) d", {"n": 2, "h": 3, "d": 4}) == (1, 6, 4)
