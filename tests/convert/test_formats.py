"""A new format is one file: it is found, detected, opened, written and offered on the command line."""

import json
import sys

import pytest

from pi0_jax import cli
from pi0_jax.convert import formats
from pi0_jax.convert.formats import detect, open_checkpoint
from tests.convert.common import STATS, save_tiny, tiny_weights

MADE_UP = """
import numpy as np

from pi0_jax.checkpoint import policy_from_json, policy_to_json
from pi0_jax.convert.assemble import claim, finished, foreign_tensors
from pi0_jax.convert.files import read_json, write_json
from pi0_jax.convert.formats import Format
from pi0_jax.convert.lazy import all_finite, open_npz, read_all
from pi0_jax.convert.parameters import parameters
from pi0_jax.convert.rules import Rule


def rules(variant):
    from pi0_jax.config import ModelConfig

    turned = Rule("action_out/kernel", "out.transposed", "action embed")
    paths = [path for path in parameters(ModelConfig(variant=variant)) if path != turned.ours]
    return (turned, *(Rule(path, path.replace("/", ".")) for path in paths))


def detect(path):
    return path if (path / "made_up.json").is_file() else None


def open_(folder, overrides):
    content = read_json(folder / "made_up.json")
    policy = policy_from_json(content["policy"])
    tensors = all_finite(open_npz(folder / "weights.npz"))
    claimed = claim(rules(policy.model.variant), tensors, policy.model)
    return finished("made-up", folder, policy, claimed, norm_stats=content["norm_stats"])


def write(opened, folder, asset_id):
    arrays = read_all(foreign_tensors(opened, "made-up", rules(opened.policy.model.variant)))
    np.savez(folder / "weights.npz", **arrays)
    write_json(folder / "made_up.json", {"policy": policy_to_json(opened.policy), "norm_stats": opened.norm_stats})
    (folder / "tokenizer.model").write_bytes(opened.tokenizer)


FORMAT = Format("made-up", "made_up.json and weights.npz", detect, open_, write)
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "a_made_up_one.py").write_text(MADE_UP)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "formats")])
    monkeypatch.delitem(sys.modules, "pi0_jax.convert.commands", raising=False)
    formats.formats.cache_clear()
    yield
    formats.formats.cache_clear()
    sys.modules.pop("pi0_jax.convert.commands", None)
    sys.modules.pop("pi0_jax.convert.formats.a_made_up_one", None)


def test_a_format_is_one_file(tmp_path, made_up, capsys):
    source = save_tiny(tmp_path / "source", "pi0")
    target, back = str(tmp_path / "target"), str(tmp_path / "back")
    assert "made-up" in formats.writable()
    assert cli.main(["convert", str(source), target, "--to", "made-up"]) == 0
    assert "as made-up" in capsys.readouterr().out
    assert detect(tmp_path / "target")[0].name == "made-up"
    opened = open_checkpoint(target)
    assert opened.norm_stats == STATS
    assert opened.names["action_out/kernel"] == "out.transposed"
    assert cli.main(["inspect", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "made-up"
    assert cli.main(["convert", target, back]) == 0
    assert cli.main(["diff", str(source), back]) == 0
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    assert "made-up" in capsys.readouterr().out


def test_every_format_describes_itself(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="and no checkpoint") as error:
        open_checkpoint(tmp_path)
    for format in formats.formats().values():
        assert f"{format.name} " in str(error.value)
        assert format.contents in str(error.value)


def test_a_format_that_is_read_only_is_not_offered(tmp_path):
    assert formats.writable() == ("pi0", "lerobot", "openpi", "openpi-torch", "peft")
    with pytest.raises(ValueError, match="can be read and not written"):
        formats.write_checkpoint(tiny_weights("pi0_fast"), tmp_path / "out", "big_vision")
