"""`pi0 convert`, `inspect` and `diff` from the command line."""

import json

import pytest

from pi0_jax import cli
from pi0_jax.convert.formats import write_checkpoint
from tests.convert.common import save_tiny, tiny_weights


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
