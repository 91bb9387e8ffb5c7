"""There and back through every format, bit for bit; and every damaged tensor stops a conversion by name."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from pi0_jax import checkpoint
from pi0_jax.config import Gaussian, Guidance
from pi0_jax.convert.assemble import foreign_tensors
from pi0_jax.convert.describe import describe, differences, text
from pi0_jax.convert.formats import Overrides, open_checkpoint, openpi, write_checkpoint
from pi0_jax.convert.lazy import in_memory, open_safetensors, read_all, write_safetensors
from pi0_jax.convert.orbax_format import open_orbax, write_orbax
from pi0_jax.convert.run import convert
from pi0_jax.sampler import Euler
from tests.convert.common import DTYPES, MODELS, STATS, save_tiny, tiny_model, tiny_weights

FORMATS = ("openpi", "openpi-torch", "lerobot")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of ours, by model and dtype."""
    root = tmp_path_factory.mktemp("saved")
    return {(name, d): save_tiny(root / f"{name}-{d}", name, DTYPES[d]) for name in MODELS for d in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", FORMATS)
def test_there_and_back_is_the_same_bit_for_bit(saved, tmp_path, name, dtype, to):
    source = saved[name, dtype]
    if name == "pi0_lora" and to != "openpi":
        with pytest.raises(ValueError, match=r"no place.*q_lora_a.*--merge-lora"):
            convert(source, tmp_path / "out", to)
        return
    record = convert(source, tmp_path / "out", to)
    back = convert(tmp_path / "out", tmp_path / "back", "pi0")
    assert record["weights_sha256"] == back["weights_sha256"] == record["source"]["sha256"]
    assert differences(open_checkpoint(source), open_checkpoint(tmp_path / "back")) == []
    found = read_all(open_checkpoint(tmp_path / "back").tensors)
    expected = read_all(tiny_weights(name, DTYPES[dtype]).tensors)
    assert {path: array.tobytes() for path, array in found.items()} == {p: a.tobytes() for p, a in expected.items()}


def source_of(kind, name, folder):
    """A checkpoint of a format, its tensors, and a function that writes them anew."""
    write_checkpoint(tiny_weights(name), folder, kind)
    if kind == "openpi":
        tensors = read_all(open_orbax(folder / "params"))

        def rewrite(changed):
            shutil.rmtree(folder / "params")
            write_orbax(folder / "params", {name: in_memory(array) for name, array in changed.items()})
    else:
        tensors = read_all(open_safetensors(folder / "model.safetensors"))

        def rewrite(changed):
            write_safetensors(folder / "model.safetensors", {n: in_memory(a) for n, a in changed.items()})

    return tensors, rewrite


OVERRIDES = Overrides(horizon=6, vision_heads=2, num_heads=4, num_kv_heads=1, lora_scale=2.0)


def test_failed_conversions_leave_nothing_behind(tmp_path):
    tensors, rewrite = source_of("lerobot", "pi0", tmp_path / "x")
    victim = "model.action_out_proj.weight"
    rewrite({**tensors, victim: np.full_like(tensors[victim], np.inf)})
    with pytest.raises(ValueError, match=r"action_out_proj\.weight holds numbers that are not finite"):
        convert(tmp_path / "x", tmp_path / "out", overrides=OVERRIDES)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_target_that_exists_is_kept_unless_told_otherwise(saved, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(saved["pi0", "float32"], tmp_path / "out", "openpi")
    convert(saved["pi0", "float32"], tmp_path / "out", "openpi", overwrite=True)
    assert (tmp_path / "out" / "params").is_dir()


def test_what_a_source_does_not_say_is_asked_for_by_name(saved, tmp_path):
    write_checkpoint(tiny_weights("pi0"), tmp_path / "jax", "openpi")
    write_checkpoint(tiny_weights("pi0_lora"), tmp_path / "lora", "openpi")
    write_checkpoint(tiny_weights("pi0"), tmp_path / "torch", "openpi-torch")
    with pytest.raises(ValueError, match="--horizon"):
        open_checkpoint(tmp_path / "jax")
    with pytest.raises(ValueError, match="--lora-scale"):
        open_checkpoint(tmp_path / "lora", Overrides(horizon=6))
    with pytest.raises(ValueError, match="--vision-heads"):
        open_checkpoint(tmp_path / "torch")
    weights = open_checkpoint(tmp_path / "jax", Overrides(horizon=6, cameras=("top", "tool")))
    assert weights.policy.robot == "arm"
    assert weights.policy.model.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert weights.norm_stats == STATS


def test_a_lerobot_folder_of_the_wrong_type_is_refused(tmp_path):
    write_checkpoint(tiny_weights("pi05"), tmp_path / "x", "lerobot")
    path = tmp_path / "x" / "config.json"
    path.write_text(path.read_text().replace('"pi05"', '"pi0"'))
    with pytest.raises(ValueError, match=r"says 'pi0'.*are of a 'pi05'"):
        open_checkpoint(tmp_path / "x", OVERRIDES)


def test_settings_of_lerobot_are_read_and_those_that_we_lack_refused(tmp_path):
    write_checkpoint(tiny_weights("pi05"), tmp_path / "x", "lerobot")
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    config["input_features"]["observation.images.empty_camera_0"] = {"type": "VISUAL", "shape": [3, 16, 16]}
    path.write_text(json.dumps(config | {"rtc_training_max_delay": 3, "empty_cameras": 1}))
    policy = open_checkpoint(tmp_path / "x", OVERRIDES).policy
    assert policy.objective == Gaussian(max_delay=3)
    assert policy.model.cameras == tiny_model("pi05").cameras  # an empty camera is always masked: none at all
    for changed in ({"use_visual_memory": True}, {"use_proprioceptive_memory": True}, {"min_period": 1e-3}):
        path.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=next(iter(changed))):
            open_checkpoint(tmp_path / "x", OVERRIDES)
    path.write_text(json.dumps(config | {"input_features": {}}))
    found = open_checkpoint(tmp_path / "x", OVERRIDES)
    assert len(found.policy.model.cameras) == 3
    assert "names no cameras" in found.warnings[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"LeRobot's names.*config\.json"):
        open_checkpoint(tmp_path / "x", OVERRIDES)


def test_what_other_formats_have_no_place_for_is_said_and_remembered(tmp_path, caplog):
    weights = tiny_weights("pi05")
    policy = dataclasses.replace(weights.policy, objective=Gaussian(max_delay=2), guidance=Guidance(1.5))
    write_checkpoint(weights._replace(policy=policy), tmp_path / "x", "pi0")
    convert(tmp_path / "x", tmp_path / "lerobot", "lerobot")
    assert '"rtc_training_max_delay": 2' in caplog.text
    assert "guidance.scale 1.5" in caplog.text
    assert "rtc_training_max_delay" not in (tmp_path / "lerobot/config.json").read_text()  # 0.6.1 would not load it
    assert open_checkpoint(tmp_path / "lerobot").policy == policy


def test_a_config_that_was_changed_in_lerobot_wins_over_the_record(saved, tmp_path):
    convert(saved["pi05", "float32"], tmp_path / "x", "lerobot")
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    changed = {"n_action_steps": 2, "num_inference_steps": 5, "tokenizer_max_length": 9, "rtc_training_max_delay": 1}
    path.write_text(json.dumps(config | changed))
    policy = open_checkpoint(tmp_path / "x").policy
    assert (policy.execute_steps, policy.sampler) == (2, Euler(5))
    assert (policy.model.prompt_length, policy.objective) == (9, Gaussian(max_delay=1))
    assert policy.robot == "arm"


@pytest.mark.parametrize("keep", ["lm_head", "embed_tokens", "both"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_tied_embeddings_and_prefixes_of_lerobot_are_read_in_every_form(tmp_path, keep, prefix):
    tensors, rewrite = source_of("lerobot", "pi0", tmp_path / "x")
    head, embedding = (
        next(n for n in tensors if n.endswith(f"{end}.weight")) for end in ("paligemma.lm_head", "embed_tokens")
    )
    junk = next(name for name in tensors if name.endswith("gemma_expert.lm_head.weight"))
    expected = tensors[embedding]
    changed = {**tensors, junk: np.full_like(tensors[junk], 7.0)}
    if keep == "both":
        changed[head] = expected + 1  # trained apart in LeRobot; the embedding is what the model reads
    else:
        del changed[embedding if keep == "lm_head" else head]
    rewrite({prefix + name.removeprefix("model."): array for name, array in changed.items()})
    weights = open_checkpoint(tmp_path / "x", OVERRIDES)
    assert np.array_equal(weights.tensors["embedding"].read(None), expected)
    assert junk.removeprefix("model.") in weights.dropped


def test_rounding_to_bfloat16_says_so_and_keeps_what_it_can(saved, tmp_path, caplog):
    record = convert(saved["pi0", "float32"], tmp_path / "half", dtype="bfloat16")
    assert record["dtypes"] == ["bfloat16"]
    assert record["source"]["sha256"] != record["weights_sha256"]
    assert "precision is lost" in caplog.text
    caplog.clear()
    convert(tmp_path / "half", tmp_path / "whole", dtype="float32")
    assert "precision" not in caplog.text
    half, whole = (read_all(open_checkpoint(tmp_path / name).tensors) for name in ("half", "whole"))
    full = read_all(open_checkpoint(saved["pi0", "float32"]).tensors)
    for path, array in full.items():
        assert np.array_equal(whole[path], array.astype(ml_dtypes.bfloat16).astype(np.float32))
        assert np.array_equal(half[path].astype(np.float32), whole[path])


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_of_different_dtypes_are_widened_and_not_rounded(tmp_path, layer):
    tensors, rewrite = source_of("lerobot", "pi0", tmp_path / "x")
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    name = f"model.paligemma_with_expert.gemma_expert.model.layers.{layer}.mlp.up_proj.weight"
    rewrite({**half, name: tensors[name]})
    convert(tmp_path / "x", tmp_path / "out", overrides=OVERRIDES)
    found = read_all(open_checkpoint(tmp_path / "out").tensors)
    leaf = found["backbone/layers/action/mlp/gate_up"]
    assert np.array_equal(leaf[layer, 1], tensors[name].T)
    assert np.array_equal(leaf[1 - layer, 1], half[name.replace(f".{layer}.", f".{1 - layer}.")].T.astype(np.float32))
    assert found["backbone/layers/action/mlp/down"].dtype == ml_dtypes.bfloat16


def test_results_are_checkpoints_that_the_rest_of_the_package_reads(saved, tmp_path):
    write_checkpoint(tiny_weights("pi05"), tmp_path / "x", "lerobot")
    convert(tmp_path / "x", tmp_path / "out", overrides=OVERRIDES)
    assets = checkpoint.load_assets(tmp_path / "out")
    assert assets.policy.model.action_horizon == 6
    assert assets.norm_stats == STATS
    params = checkpoint.restore_params(tmp_path / "out")
    for path, array in read_all(tiny_weights("pi05").tensors).items():
        leaf = params
        for key in path.split("/"):
            leaf = leaf[key]
        assert np.array_equal(leaf, array)


def test_statistics_that_were_changed_in_lerobot_win_over_the_exact_copy(tmp_path):
    write_checkpoint(tiny_weights("pi0"), tmp_path / "x", "lerobot")
    assert open_checkpoint(tmp_path / "x", OVERRIDES).norm_stats == STATS
    (file,) = tmp_path.glob("x/policy_preprocessor_step_*_normalizer_processor.safetensors")
    stats = read_all(open_safetensors(file))
    stats["action.mean"] = stats["action.mean"] + 1
    write_safetensors(file, {name: in_memory(array) for name, array in stats.items()})
    found = open_checkpoint(tmp_path / "x", OVERRIDES).norm_stats["norm_stats"]
    assert found["actions"]["mean"] == pytest.approx([1.1, 4 / 3])
    assert found["state"]["mean"] == pytest.approx([0.1, 1 / 3])


def _paligemma():
    return foreign_tensors(tiny_weights("pi0_fast", ml_dtypes.bfloat16), "openpi", openpi.rules("pi0_fast"))


def test_big_vision_weights_get_a_fresh_action_expert(tmp_path):
    tensors = {name.replace("PaliGemma/", "params/"): array for name, array in read_all(_paligemma()).items()}
    np.savez(tmp_path / "pt.npz", **tensors)
    blocks = {}
    for name, array in tensors.items():  # the same, as models without scan are saved
        if "/encoderblock/" in name:
            blocks |= {name.replace("encoderblock", f"encoderblock_{i}"): layer for i, layer in enumerate(array)}
        else:
            blocks[name] = array
    np.savez(tmp_path / "blocks.npz", **{f"opt/target/{n.removeprefix('params/')}": a for n, a in blocks.items()})
    tiny = tiny_model("pi05")
    overrides = Overrides(variant="pi05", action_dim=9, horizon=4)
    for i, name in enumerate(("pt.npz", "blocks.npz", "pt.npz:params", "blocks.npz:opt/target")):
        convert(tmp_path / name, tmp_path / str(i), overrides=overrides, model=tiny)
        found = open_checkpoint(tmp_path / str(i))
        assert found.policy.model.action == tiny.action
        assert (found.policy.model.action_dim, found.policy.model.action_horizon) == (9, 4)
        assert found.policy.model.language == tiny.language
        for path, array in read_all(tiny_weights("pi0_fast", ml_dtypes.bfloat16).tensors).items():
            assert np.array_equal(found.tensors[path].read(None), array)
        kernel = found.tensors["backbone/layers/action/attn/q"].read(None)
        assert 0.05 < kernel.std() < 0.5
    del tensors["params/llm/final_norm/scale"]
    np.savez(tmp_path / "pt.npz", **tensors)
    with pytest.raises(ValueError, match="missing: PaliGemma/llm/final_norm/scale"):
        convert(tmp_path / "pt.npz", tmp_path / "out", overrides=overrides, model=tiny)


def test_inspect_and_diff_say_what_is_there(saved, tmp_path):
    content = describe(open_checkpoint(saved["pi0_lora", "float32"]))
    assert content["family"] == "pi0"
    assert content["lora"]["action"] == {"attn_rank": 3, "mlp_rank": 5, "scale": 2.0}
    assert content["parameters"]["all"] == sum(a.size for a in read_all(tiny_weights("pi0_lora").tensors).values())
    assert content["norm_stats"]["state"]["mean"] == 2
    assert "action expert" in text(content)
    json.dumps(content)
    other = save_tiny(tmp_path / "other", "pi0_lora", seed=1)
    lines = differences(open_checkpoint(saved["pi0_lora", "float32"]), open_checkpoint(other))
    assert len(lines) == len(tiny_weights("pi0_lora").tensors)
    assert any(line.startswith("action_out/kernel: largest difference") for line in lines)
