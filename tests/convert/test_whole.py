"""Under the target's name there is a whole checkpoint or nothing: kills, full disks, and what must not be replaced."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest

from pi0_jax import cli
from pi0_jax.config import Fast, Joint
from pi0_jax.convert.describe import describe, differences, text
from pi0_jax.convert.formats import Overrides, open_checkpoint, write_checkpoint
from pi0_jax.convert.lazy import in_memory
from pi0_jax.convert.run import convert
from pi0_jax.data.fast import FastCodec
from pi0_jax.data.tokenizer import Tokenizer
from tests.convert.common import save_tiny, tiny_weights

KILLED = """
import os, signal, sys
from pi0_jax.convert import formats, run

def half(*arguments):
    formats.write_checkpoint(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

run.write_checkpoint = half
run.convert(sys.argv[1], sys.argv[2], "openpi")
"""


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source", "pi0")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_conversion_leaves_no_target_and_the_next_one_clears_what_it_left(tmp_path, source):
    killed = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "out"], timeout=100)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out.*.partial")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", "openpi")
    assert names(tmp_path) == ["out", "source"]
    left.with_suffix(".replaced").mkdir()  # as a kill after the new folder got its name leaves the old one
    convert(source, tmp_path / "out", "openpi", overwrite=True)
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("to", ["pi0", "openpi", "openpi-torch", "lerobot"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, source, capsys, to):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", to]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not write" in capsys.readouterr().err
    assert names(tmp_path) == ["source"]


def test_a_failed_replacement_keeps_the_old_checkpoint(tmp_path, source):
    convert(source, tmp_path / "out")
    weights = tiny_weights("pi0", seed=1)
    damaged = {**weights.tensors, "action_out/kernel": in_memory(np.full((14, 5), np.nan, np.float32))}
    write_checkpoint(weights._replace(tensors=damaged), tmp_path / "bad", "pi0")
    with pytest.raises(ValueError, match="action_out/kernel holds numbers that are not finite"):
        convert(tmp_path / "bad", tmp_path / "out", overwrite=True)
    assert differences(open_checkpoint(tmp_path / "out"), open_checkpoint(source)) == []
    assert names(tmp_path) == ["bad", "out", "source"]


def test_overwrite_replaces_checkpoints_and_nothing_else(tmp_path, source):
    (tmp_path / "home/documents").mkdir(parents=True)
    shutil.copytree(source, tmp_path / "run/checkpoints/100")
    (tmp_path / "notes.txt").write_text("kept")
    for target in ("home", "run", "notes.txt"):
        with pytest.raises(FileExistsError, match=r"left as it is"):
            convert(source, tmp_path / target, "openpi", overwrite=True)
    assert (tmp_path / "home/documents").is_dir()
    assert (tmp_path / "run/checkpoints/100/params").is_dir()
    convert(source, tmp_path / "run/checkpoints/100", "lerobot", overwrite=True)
    assert (tmp_path / "run/checkpoints/100/model.safetensors").is_file()


def test_a_tokenizer_and_a_robot_make_weights_a_policy(tmp_path, source):
    tokenizer = tmp_path / "words.model"
    tokenizer.write_bytes(Tokenizer.train(["push the ball"], 300).model)
    convert(source, tmp_path / "out", overrides=Overrides(robot="tabletop", tokenizer=str(tokenizer)))
    made = open_checkpoint(tmp_path / "out")
    assert made.policy.robot == "tabletop"
    assert made.tokenizer == tokenizer.read_bytes()
    with pytest.raises(ValueError, match="no robot 'tabeltop'"):
        convert(source, tmp_path / "other", overrides=Overrides(robot="tabeltop"))
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        convert(source, tmp_path / "other", overrides=Overrides(tokenizer=str(source / "assets/norm_stats.json")))


def test_an_action_codec_travels_with_the_weights(tmp_path):
    pytest.importorskip("tokenizers")
    codec = FastCodec.fit([np.random.default_rng(0).normal(size=(50, 4, 2))], 300)
    codec.save(tmp_path / "codec")
    source = save_tiny(tmp_path / "pi0_fast", "pi0_fast")
    convert(source, tmp_path / "pi0", overrides=Overrides(codec=str(tmp_path / "codec")))
    for there, back in (("openpi", "a"), ("lerobot", "b")):
        convert(tmp_path / "pi0", tmp_path / there, there)
        convert(tmp_path / there, tmp_path / back)
        opened = open_checkpoint(tmp_path / back)
        assert opened.codec == codec.files()
        assert opened.policy.execute_steps == 4  # LeRobot's n_action_steps is another thing
        assert f"FAST, {codec.num_codes} codes, scale 10, 4 actions of 2 dimensions" in text(describe(opened))
    # LeRobot's own loader finds the codec by the step's artifact, and its policy by config.json's name.
    steps = json.loads((tmp_path / "lerobot/policy_preprocessor.json").read_text())["steps"]
    assert [step["registry_name"] for step in steps][-3:] == [
        "tokenizer_processor",
        "action_tokenizer_processor",
        "device_processor",
    ]
    assert steps[-2]["artifacts"] == {"action_tokenizer_name": "action_tokenizer"}
    assert steps[-2]["config"]["max_action_tokens"] == 256
    config = json.loads((tmp_path / "lerobot/config.json").read_text())
    assert config["action_tokenizer_name"] == steps[-2]["config"]["action_tokenizer_name"] == "action_tokenizer"
    assert config["n_action_steps"] == config["chunk_size"] == 6
    assert (tmp_path / "lerobot/action_tokenizer/processor_config.json").is_file()
    assert "codec: only one has it" in differences(open_checkpoint(source), open_checkpoint(tmp_path / "pi0"))
    (tmp_path / "openpi/conversion.json").unlink()  # as released weights come: nothing says the horizon but the codec
    made = open_checkpoint(tmp_path / "openpi", Overrides(codec=str(tmp_path / "codec"), num_heads=4, num_kv_heads=1))
    assert made.policy.model.action_horizon == 4
    FastCodec.fit([np.zeros((2, 4, 2)), np.zeros((2, 5, 2))], 300).save(tmp_path / "universal")
    with pytest.raises(ValueError, match="--horizon"):
        open_checkpoint(tmp_path / "openpi", Overrides(codec=str(tmp_path / "universal")))


@pytest.mark.parametrize("to", ["openpi", "openpi-torch", "lerobot"])
def test_policies_that_write_and_flow_come_back_as_they_were(tmp_path, to):
    weights = tiny_weights("pi05", objective=Joint(text_tokens=5, codec=Fast(skip=3, max_tokens=9)))
    write_checkpoint(weights, tmp_path / "source", "pi0")
    convert(tmp_path / "source", tmp_path / "there", to)
    convert(tmp_path / "there", tmp_path / "back")
    assert differences(open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "back")) == []
    recipe = "π0.5 joint: text and action tokens by cross-entropy, beside a flow, insulated"
    assert recipe in text(describe(open_checkpoint(tmp_path / "back")))


def test_codes_of_a_table_of_their_own_stay_here(tmp_path):
    weights = tiny_weights("pi05", objective=Joint(text_tokens=5, codec=Fast(own_table=7, max_tokens=9)))
    write_checkpoint(weights, tmp_path / "source", "pi0")
    record = convert(tmp_path / "source", tmp_path / "there", "openpi")
    assert "openpi has no action tokens of a table of their own: table, head and codec are left out" in record["notes"]
    found = differences(open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "there"))
    assert len(found) == 4, found  # the objective's codec, and three parameters


def test_statistics_are_not_written_elsewhere(tmp_path, source):
    with pytest.raises(ValueError, match="--asset-id"):
        convert(source, tmp_path / "out", "openpi", overrides=Overrides(asset_id="../../elsewhere"))
    assert names(tmp_path) == ["source"]


def test_a_checkpoint_of_a_run_is_held_against_its_digests(tmp_path, source):
    files = [path for path in source.rglob("*") if path.is_file()]
    digests = {str(p.relative_to(source)): [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in files}
    digests["train_state/not_read"] = [1, 1]
    (source / "digests.json").write_text(json.dumps(digests))
    convert(source, tmp_path / "whole", "lerobot")
    stats = source / "assets/norm_stats.json"
    stats.write_text(stats.read_text().replace("0.1", "0.2"))
    with pytest.raises(ValueError, match=r"norm_stats\.json is not what was written"):
        convert(source, tmp_path / "out", "lerobot")
    convert(source, tmp_path / "out", "lerobot", edited=True)
