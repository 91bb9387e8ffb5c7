"""Source and result act alike, and where they do not, the first layer that differs is named."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from pi0_jax import cli
from pi0_jax.convert.formats import Overrides, open_checkpoint, write_checkpoint
from pi0_jax.convert.lazy import in_memory
from pi0_jax.convert.run import convert
from pi0_jax.convert.verify import agree, lerobot, openpi_torch
from tests.convert.common import save_tiny, tiny_weights, tiny_weights_of_head

FRAMEWORKS = {
    "lerobot": importlib.util.find_spec("lerobot") is not None,
    "openpi-torch": importlib.util.find_spec("openpi") is not None,
}


def changed(weights, path, at=...):
    """The weights with one tensor, or a part of it, scaled."""
    array = np.array(weights.tensors[path].read(None))
    array[at] *= 3
    return weights._replace(tensors={**weights.tensors, path: in_memory(array)})


@pytest.mark.parametrize(("name", "to"), [("pi0", "lerobot"), ("pi05", "openpi")])
def test_source_and_result_act_alike(tmp_path, name, to):
    source = save_tiny(tmp_path / "x", name)
    record = convert(source, tmp_path / "out", to, verify_with="ours")
    assert record["actions"]["agree"]
    assert record["actions"]["largest_difference"] == 0
    assert json.loads((tmp_path / "out/conversion.json").read_text())["actions"] == record["actions"]


def test_a_widened_model_acts_alike_on_old_inputs(tmp_path):
    source = save_tiny(tmp_path / "x", "pi0")
    overrides = Overrides(action_dim=9, cameras=("top", "tool", "wrist"), prompt_length=11)
    actions = convert(source, tmp_path / "wide", overrides=overrides, verify_with="ours")["actions"]
    assert actions["agree"]
    assert 0 < actions["largest_difference"] < 1e-5  # sums in another order


@pytest.mark.parametrize(
    ("path", "at", "stage"),
    [
        ("image_encoder/layers/mlp_out/kernel", 1, "image encoder, layer 1"),
        ("embedding", ..., "image and prompt tokens"),
        ("backbone/layers/language/attn/kv", 1, "backbone, values of layer 1"),
        ("backbone/layers/language/mlp/down", 0, "backbone, values of layer 1"),
        ("backbone/layers/action/attn/kv", 0, "backbone, values of layer 0"),
        ("action_out/kernel", ..., "first velocity"),
    ],
)
def test_the_first_layer_that_differs_is_named(path, at, stage):
    weights = tiny_weights("pi05")
    found = agree.agreement(weights, changed(weights, path, at), "ours", tolerance=1e-5)
    assert not found["agree"]
    assert found["diverges_at"].startswith(stage)


def test_a_large_difference_is_recorded_and_the_exit_code_says_so(tmp_path, capsys):
    source = str(save_tiny(tmp_path / "x", "pi05"))
    arguments = ["--dtype", "bfloat16", "--verify-with", "ours", "--tolerance", "1e-6"]
    assert cli.main(["convert", source, str(tmp_path / "half"), *arguments]) == 1
    assert "diverge at image encoder, layer 0" in capsys.readouterr().err
    record = json.loads((tmp_path / "half/conversion.json").read_text())
    assert not record["actions"]["agree"]
    assert any("diverge at" in note for note in record["notes"])
    assert cli.main(["convert", source, str(tmp_path / "same"), "--verify-with", "ours"]) == 0
    assert "10-step actions in our network differ by at most 0" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["Compact", "Tokens"])
def test_other_heads_are_compared_too(head):
    weights = tiny_weights_of_head(head)
    assert agree.agreement(weights, weights, "ours", 1e-6)["agree"]
    other = changed(weights, "backbone/layers/language/attn/kv", 1)
    traces = [agree.run_ours(w, agree.example(weights.policy.model)).stages for w in (weights, other)]
    expected = "pooled observation" if head == "Compact" else "the solver's steps"
    assert agree.first_difference(*traces, 1e-5).startswith(expected)


def test_what_cannot_be_compared_is_said_before_anything_is_written(tmp_path):
    source = save_tiny(tmp_path / "x", "pi0")
    with pytest.raises(ValueError, match="another --horizon"):
        convert(source, tmp_path / "out", overrides=Overrides(horizon=9), verify_with="ours")
    with pytest.raises(ValueError, match="needs a lerobot folder"):
        convert(source, tmp_path / "out", "openpi", verify_with="lerobot")
    with pytest.raises(ValueError, match="has none; leave it out"):
        convert(save_tiny(tmp_path / "fast", "pi0_fast"), tmp_path / "out", "openpi", verify_with="ours")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("framework", "install"), [("lerobot", r"pip install .*lerobot\[pi\]"), ("openpi-torch", "transformers_replace")]
)
def test_without_a_framework_the_message_says_how_to_install_it(tmp_path, framework, install):
    if FRAMEWORKS[framework]:
        pytest.skip(f"{framework} is installed")
    with pytest.raises(ValueError, match=install):
        convert(save_tiny(tmp_path / "x", "pi0"), tmp_path / "out", framework, verify_with=framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_another_framework_acts_as_we_do(tmp_path, framework, name):
    if not FRAMEWORKS[framework]:
        pytest.skip(f"{framework} is not installed (docs/checkpoints.md says how)")
    # Both write the number of query heads, 8, into their attention. The weights are several times an initialiser's.
    model = dataclasses.replace(tiny_weights(name).policy.model, num_heads=8)
    write_checkpoint(tiny_weights(name, model=model), tmp_path / "x", "pi0")
    for source, target, to in (("x", "out", framework), ("out", "back", "pi0")):
        found = convert(tmp_path / source, tmp_path / target, to, verify_with=framework)["actions"]
        assert 0 < found["largest_difference"] <= 1e-5, found
    wrong = changed(open_checkpoint(tmp_path / "x"), "backbone/layers/action/mlp/down", 0)
    found = agree.agreement(wrong, open_checkpoint(tmp_path / "out"), framework, 1e-4)
    assert found["diverges_at"].startswith("backbone, values of layer 1")


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_flow_times_in_double_precision_are_ours_but_for_rounding(name):
    weights = tiny_weights(name)
    inputs = agree.example(weights.policy.model)
    ours = agree.run_ours(weights, inputs).actions
    double = agree.run_ours(weights, inputs, openpi_torch.euler_times(agree.STEPS)).actions
    other = agree.run_ours(weights, inputs, tuple(0.99 * t for t in openpi_torch.euler_times(agree.STEPS))).actions
    assert 0 < np.abs(double - ours).max() < 1e-3
    assert np.abs(other - ours).max() > 1e-2
    assert np.abs(np.subtract(openpi_torch.euler_times(10), lerobot.uniform_times(10))).max() < 1e-6
