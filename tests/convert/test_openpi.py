import functools

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax.convert.openpi import RULES, params_from_openpi, read_params
from pi0_jax.model.velocity import VelocityNetwork
from pi0_jax.pi0 import init_params
from tests.conftest import tiny_config


@functools.cache
def our_tree(variant: str) -> dict:
    """Random parameters of the tiny model."""
    network, rng = VelocityNetwork(tiny_config(variant)), np.random.default_rng(0)
    shapes = nn.meta.unbox(jax.eval_shape(lambda: init_params(network, jax.random.key(0))))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def openpi_tree(variant: str) -> dict:
    """The same under openpi's names and in openpi's shapes."""
    ours = flatten_dict(our_tree(variant), sep="/")
    moves = {"attn/q": (0, 2, 1, 3), "attn/kv": (0, 1, 3, 2, 4)}
    flat = {}
    for rule in RULES:
        is_time = rule.theirs.startswith(("time_mlp", "action_time_mlp"))
        if rule.ours not in ours or (is_time and rule.theirs.startswith("time") != (variant == "pi05")):
            continue
        axes = next((axes for end, axes in moves.items() if rule.ours.endswith(end)), None)
        leaf = np.asarray(ours[rule.ours])
        flat[rule.theirs] = leaf if axes is None else leaf.transpose(axes)
    return flat


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
@pytest.mark.parametrize("trailing", [False, True])
def test_released_and_training_layouts_read_to_the_same_parameters(tmp_path, variant, trailing):
    flat = openpi_tree(variant)
    names = {f"{name}/value" if trailing else name: leaf for name, leaf in flat.items()}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step" / "params", {"params": unflatten_dict(names, sep="/")})
    params = params_from_openpi(read_params(tmp_path / "step"), tiny_config(variant))
    jax.tree.map(np.testing.assert_array_equal, params, our_tree(variant))


def test_the_wrong_variant_is_refused_with_both_sides():
    with pytest.raises(ValueError, match=r"nothing in the source for .*modulation"):
        params_from_openpi(openpi_tree("pi0"), tiny_config("pi05"))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not an openpi checkpoint"):
        read_params(tmp_path)
