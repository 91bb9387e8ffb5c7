"""peft itself reads our adapters and adds them as we do, and we read what it saves. Skipped without it."""

import json

import numpy as np
import pytest

from pi0_jax.convert.change import merge_lora
from pi0_jax.convert.formats import Overrides, open_checkpoint
from pi0_jax.convert.run import convert
from tests.convert.test_peft import base, base_weights, run, torch_weights  # noqa: F401

torch = pytest.importorskip("torch", reason="needs torch")
peft = pytest.importorskip("peft", reason="needs peft")


class Node(torch.nn.Module):
    """A module that is there for the names of its children."""


def policy(weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """Modules of LeRobot's names with these weights, linear layers where they are matrices."""
    root = Node()
    for name, array in weights.items():
        *path, leaf, kind = f"model.{name}".split(".")
        node = root
        for child in path:
            if not hasattr(node, child):
                node.add_module(child, Node())
            node = getattr(node, child)
        if not hasattr(node, leaf):
            module = Node()
            if array.ndim == 2 and kind == "weight":
                module = torch.nn.Linear(array.shape[1], array.shape[0], bias=f"{name[: -len(kind)]}bias" in weights)
            node.add_module(leaf, module)
        getattr(node, leaf).register_parameter(kind, torch.nn.Parameter(torch.from_numpy(array.copy())))
    return root


def assert_same(module: torch.nn.Module, expected: dict[str, np.ndarray]):
    found = module.state_dict()
    for name, array in expected.items():
        np.testing.assert_allclose(found[f"model.{name}"].numpy(), array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_peft_reads_our_adapters(run, base, tmp_path):  # noqa: F811
    convert(run, tmp_path / "adapters", "peft")
    loaded = peft.PeftModel.from_pretrained(policy(torch_weights(open_checkpoint(base))), str(tmp_path / "adapters"))
    assert_same(loaded.merge_and_unload(), torch_weights(merge_lora(open_checkpoint(run))))


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_what_peft_saves(base, tmp_path, rslora):  # noqa: F811
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=r".*\.gemma_expert\..*\.(q|v|gate)_proj|model\.(state_proj|action_in_proj)",
        alpha_pattern={"state_proj": 3},
        rank_pattern={"v_proj": 2},
        modules_to_save=["action_out_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(policy(torch_weights(base_weights())), config)
    with torch.no_grad():
        model.base_model.model.model.action_out_proj.modules_to_save["default"].weight += 1
    model.save_pretrained(str(tmp_path / "adapters"))
    assert json.loads((tmp_path / "adapters/adapter_config.json").read_text())["peft_type"] == "LORA"
    found = torch_weights(open_checkpoint(tmp_path / "adapters", Overrides(base=str(base))))
    assert_same(model.merge_and_unload(), found)
