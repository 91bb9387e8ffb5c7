"""`pi0 convert`, `inspect` and `diff` from the command line."""

import json
import re

import pytest

from pi0_jax import cli
from pi0_jax.convert.formats import write_checkpoint
from tests.convert.common import HEADS, save_tiny, tiny_weights, tiny_weights_of_head


def test_a_checkpoint_is_converted_inspected_and_compared(tmp_path, capsys):
    write_checkpoint(tiny_weights("pi05"), tmp_path / "lerobot", "lerobot")
    source, ours, back = (str(tmp_path / name) for name in ("lerobot", "ours", "back"))
    heads = ["--num-heads", "4", "--num-kv-heads", "1", "--vision-heads", "2"]
    assert cli.main(["convert", source, ours, *heads]) == 0
    assert "compared bit for bit" in capsys.readouterr().out
    assert cli.main(["inspect", ours, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "pi05"
    assert cli.main(["convert", ours, back, "--to", "openpi", "--no-verify"]) == 0
    assert cli.main(["inspect", back]) == 0
    assert "π0.5" in capsys.readouterr().out
    assert cli.main(["diff", source, ours, *heads]) == 0


def test_diff_tells_equal_from_different_by_its_exit_code(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_tiny(tmp_path / name, "pi0", seed=seed)
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "action_out/kernel: largest difference" in capsys.readouterr().out


def test_what_is_missing_is_one_message_with_the_flag(tmp_path, capsys):
    write_checkpoint(tiny_weights("pi0"), tmp_path / "openpi", "openpi")
    assert cli.main(["convert", str(tmp_path / "openpi"), str(tmp_path / "out")]) == 1
    assert "--horizon" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_choice(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--to", "--horizon", "--merge-lora", "--action-dim", "--vision-heads"))


@pytest.mark.parametrize("head", HEADS)
def test_heads_that_exist_only_here_are_shown_compared_and_kept_out_of_other_formats(tmp_path, capsys, head):
    for name, seed in (("a", 0), ("b", 1)):
        write_checkpoint(tiny_weights_of_head(head, seed), tmp_path / name, "pi0")
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    assert cli.main(["inspect", a]) == 0
    assert head in capsys.readouterr().out
    assert cli.main(["inspect", a, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    tensors = tiny_weights_of_head(head).tensors.values()
    assert content["parameters"]["all"] == sum(tensor.size for tensor in tensors)
    assert content["parameters"]["head"] > 0
    assert cli.main(["diff", a, b]) == 1
    assert f"differ in {len(tensors)} places" in capsys.readouterr().err
    for to in ("openpi", "openpi-torch", "lerobot"):
        assert cli.main(["convert", a, out, "--to", to]) == 1
        assert f"{to} holds action experts that predict velocities" in capsys.readouterr().err
    assert cli.main(["convert", a, out, "--action-dim", "9"]) == 1
    assert "--action-dim" in capsys.readouterr().err
    assert cli.main(["convert", a, out]) == 0
    assert cli.main(["diff", a, out]) == 0


def test_a_lost_parameter_of_another_head_is_named(tmp_path, capsys):
    weights = tiny_weights_of_head("Compact")
    tensors = {path: tensor for path, tensor in weights.tensors.items() if path != "time_in/bias"}
    write_checkpoint(weights._replace(tensors=tensors), tmp_path / "a", "pi0")
    assert cli.main(["inspect", str(tmp_path / "a")]) == 1
    assert "missing: time_in/bias" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "empty folder, and no checkpoint"),
        ({"notes.txt": "x"}, r"folder with notes\.txt, and no checkpoint"),
        ({"model.safetensors.index.json": "{}"}, "weights in several files"),
        ({"adapter_model.safetensors": "x"}, "PEFT adapters without their adapter_config"),
        ({"pytorch_model.bin": "x"}, "pickled PyTorch weights"),
        ({"params/d/x": "x", "assets/arm/norm_stats.json": "{}"}, r"params has no _METADATA"),
        ({"model.safetensors": "x", "config.json": "{bad"}, r"config\.json is damaged or cut short"),
        ({"model.safetensors": "x"}, r"no safetensors file, or is cut short"),
        ({"a.npz": "x", "b.npz": "x"}, "its own path where there are several"),
        ({"a.npz": "x"}, "no npz file"),
        ({"meta/info.json": "{}"}, "is a data set, not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named_for_what_it_is(tmp_path, capsys, files, message):
    (tmp_path / "x").mkdir()
    for name, content in files.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text(content)
    for command in (["inspect"], ["convert", "--to", "openpi"]):
        assert (
            cli.main([command[0], str(tmp_path / "x"), *([str(tmp_path / "out")] * (len(command) > 1)), *command[1:]])
            == 1
        )
        said = capsys.readouterr().err
        assert re.search(message, said), said
        assert "pi0 convert " not in said  # no advice to do what was just done
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_openpi_does_not_store_is_no_difference(tmp_path, capsys):
    save_tiny(tmp_path / "ours", "pi0_lora")
    write_checkpoint(tiny_weights("pi0_lora"), tmp_path / "openpi", "openpi")
    cli.main(["diff", str(tmp_path / "ours"), str(tmp_path / "openpi")])
    said = capsys.readouterr().out
    assert "horizon" not in said
    assert "lora_scale" not in said
    assert "cameras" in said
