"""LoRA adapters in peft's format: W + alpha / rank · B A is what our adapters make of W, and the other way round."""

import dataclasses
import json
import re

import numpy as np
import pytest

from pi0_jax import cli
from pi0_jax.config import TrainConfig
from pi0_jax.convert.change import merge_lora
from pi0_jax.convert.formats import Overrides, open_checkpoint, openpi_torch, write_checkpoint
from pi0_jax.convert.lazy import in_memory, open_safetensors, read_all, write_safetensors
from pi0_jax.convert.run import convert
from tests.convert.common import tiny_model, tiny_weights

EXPERT = "model.paligemma_with_expert.gemma_expert.model.layers"
TRAINED = ("action_out/kernel", "image_encoder/norm/bias")
"""Parameters that the run trained besides its adapters."""


def base_weights(variant="pi0"):
    """Weights with two key/value heads, so that their order counts."""
    return tiny_weights(variant, model=dataclasses.replace(tiny_model(variant), num_kv_heads=2))


@pytest.fixture
def base(tmp_path):
    write_checkpoint(base_weights(), tmp_path / "base", "pi0")
    return tmp_path / "base"


@pytest.fixture
def run(tmp_path, base):
    """A run that trained adapters and some other parameters, from the base."""
    start = base_weights()
    adapted = tiny_weights("pi0_lora", seed=1, model=dataclasses.replace(tiny_model("pi0_lora"), num_kv_heads=2))
    tensors = {path: tensor for path, tensor in adapted.tensors.items() if "_lora_" in path or path in TRAINED}
    train = TrainConfig(policy=adapted.policy, init_from=str(base))
    folder = tmp_path / "runs/arm"
    trained = adapted._replace(tensors=start.tensors | tensors, train=train)
    write_checkpoint(trained, folder / "checkpoints/7", "pi0")
    return folder


def torch_weights(opened):
    return read_all(openpi_torch.torch_tensors(opened, "lerobot"))


def test_adapters_are_written_as_peft_adds_them(run, base, tmp_path):
    convert(run, tmp_path / "adapters", "peft")
    config = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    stored = read_all(open_safetensors(tmp_path / "adapters/adapter_model.safetensors"))
    expected = torch_weights(merge_lora(open_checkpoint(run)))
    found = torch_weights(open_checkpoint(base))
    adapted = set()
    for key, a in stored.items():
        if ".lora_A." not in key:
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert re.fullmatch(config["target_modules"], module)
        rank, alpha = (
            next(value for key, value in config[name].items() if re.match(rf"(.*\.)?({key})$", module))
            for name in ("rank_pattern", "alpha_pattern")
        )
        assert a.shape[0] == rank
        name = module.removeprefix("model.") + ".weight"
        found[name] = found[name] + alpha / rank * stored[key.replace("lora_A", "lora_B")] @ a
        adapted.add(name)
    assert len(adapted) == 2 * 2 * 7  # experts, layers, and q, k, v, o, gate, up, down
    whole = {key.removeprefix("base_model.model.model.") for key in stored if ".lora_" not in key}
    norm = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm"
    assert whole == {f"{module}.{end}" for module in ("action_out_proj", norm) for end in ("weight", "bias")}
    assert config["modules_to_save"] == sorted({"model." + name.rpartition(".")[0] for name in whole})
    for name in whole:
        found[name] = stored[f"base_model.model.model.{name}"]
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    assert json.loads((tmp_path / "adapters/config.json").read_text())["use_peft"] is True
    assert "PeftModel.from_pretrained(PI0Policy" in (tmp_path / "adapters/README.md").read_text()


@pytest.mark.parametrize("format", ["pi0", "lerobot"])
def test_adapters_on_their_base_are_the_run_merged(run, base, tmp_path, format):
    convert(run, tmp_path / "adapters", "peft")
    if format != "pi0":
        base = tmp_path / format
        write_checkpoint(base_weights(), base, format)
    heads = Overrides(num_heads=4, num_kv_heads=2, vision_heads=2, base=str(base))
    convert(tmp_path / "adapters", tmp_path / "merged", overrides=heads)
    merged, expected = open_checkpoint(tmp_path / "merged"), merge_lora(open_checkpoint(run))
    assert dataclasses.replace(merged.policy.model, remat=expected.policy.model.remat) == expected.policy.model
    assert merged.norm_stats == expected.norm_stats
    for path, array in read_all(expected.tensors).items():
        np.testing.assert_allclose(merged.tensors[path].read(None), array, rtol=1e-5, atol=1e-6, err_msg=path)


def write_adapters(folder, shapes, rank=3, **config):
    """Adapters as LeRobot trains them, of modules by name; and their halves."""
    rng, halves = np.random.default_rng(0), {}
    for module, (out, into) in shapes.items():
        halves[module] = tuple(rng.normal(size=size).astype(np.float32) for size in ((rank, into), (out, rank)))
    folder.mkdir()
    named = {f"{module}.lora_{x}": half for module, pair in halves.items() for x, half in zip("AB", pair, strict=True)}
    tensors = {f"base_model.model.{name}.weight": in_memory(half) for name, half in named.items()}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "base_model_name_or_path": "lerobot/pi0_base"} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return halves


@pytest.mark.parametrize(("config", "scale"), [({}, 4.0), ({"use_rslora": True}, 12 / 3**0.5)])
def test_adapters_that_lerobot_trained_are_added_with_their_scale(base, tmp_path, config, scale):
    before = torch_weights(open_checkpoint(base))
    modules = [f"{EXPERT}.1.self_attn.v_proj", f"{EXPERT}.0.self_attn.q_proj", "model.action_in_proj"]
    shapes = {module: before[module.removeprefix("model.") + ".weight"].shape for module in modules}
    patterns = {"alpha_pattern": {"action_in_proj": 6}}
    halves = write_adapters(tmp_path / "adapters", shapes, **config, **patterns)
    assert cli.main(["convert", str(tmp_path / "adapters"), str(tmp_path / "out"), "--base", str(base)]) == 0
    after = torch_weights(open_checkpoint(tmp_path / "out"))
    for name, array in before.items():
        if (module := f"model.{name.removesuffix('.weight')}") in halves:
            a, b = halves[module]
            array = array + scale * (0.5 if module.endswith("action_in_proj") else 1.0) * b @ a
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_adapters_that_do_not_fit_are_named(base, run, tmp_path):
    write_adapters(tmp_path / "x", {"model.action_in_proj": (3, 3), "model.nowhere": (2, 2)})
    with pytest.raises(ValueError, match=r"lerobot/pi0_base.* are not on this machine.*--base"):
        open_checkpoint(tmp_path / "x")
    with pytest.raises(ValueError, match=r"action_in_proj: A \(3, 3\)(?s:.*)unexpected: .*nowhere\.lora_A"):
        open_checkpoint(tmp_path / "x", Overrides(base=str(base)))
    with pytest.raises(ValueError, match="have adapters themselves"):
        open_checkpoint(tmp_path / "x", Overrides(base=str(run)))
    path = tmp_path / "x/adapter_config.json"
    for changed, message in (({"use_dora": True}, "use_dora"), ({"peft_type": "VERA"}, "VERA")):
        path.write_text(json.dumps({"peft_type": "LORA"} | changed))
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / "x", Overrides(base=str(base)))
    path.unlink()
    with pytest.raises(ValueError, match=r"without their adapter_config\.json"):
        open_checkpoint(tmp_path / "x", Overrides(base=str(base)))


def test_adapters_without_a_known_base_are_not_written(base, run, tmp_path):
    with pytest.raises(ValueError, match=r"no LoRA adapters.*--to lerobot"):
        convert(base, tmp_path / "out", "peft")
    opened = open_checkpoint(run)
    lost = dataclasses.replace(opened.train, init_from=None)
    write_checkpoint(opened._replace(train=lost), tmp_path / "lost", "pi0")
    with pytest.raises(ValueError, match=r"not on record.*--base"):
        convert(tmp_path / "lost", tmp_path / "out", "peft")
    convert(tmp_path / "lost", tmp_path / "out", "peft", overrides=Overrides(base=str(base)))
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["verified"]
    with pytest.raises(ValueError, match="compare what they merge to"):
        convert(run, tmp_path / "more", "peft", verify_with="ours")
