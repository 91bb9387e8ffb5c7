"""`pi0 infer`: on an observation in a file, and the template of one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from pi0_jax import cli
from pi0_jax.data.robots import get_robot
from pi0_jax.evaluate import commands
from pi0_jax.inference.files import load_observation, save_observation
from pi0_jax.inference.policy import Policy


class Slow(Policy):
    """A policy without a network: whenever it is asked, `printed` gets what was printed before."""

    given: dict

    def __init__(self, printed):
        self.robot, self.printed, self.asked = get_robot("tabletop"), printed, []

    def infer(self, observation, seed=0, **_):
        self.asked.append(self.printed())
        return np.full((2, 3), 0.25, np.float32)

    def forget_latency(self):
        pass

    def latency(self):
        return {"total": {"p50": 1.0}, "device": {"p50": 1.0}}


@pytest.fixture
def slow(capsys, monkeypatch):
    """The policy that `pi0 infer` loads, and how it was loaded."""
    policy = Slow(lambda: capsys.readouterr().out)

    def load(path, **given):
        policy.given = given
        return policy

    monkeypatch.setattr(Policy, "load", load)
    monkeypatch.setattr(commands, "plot_chunk", lambda *_: None)
    return policy


def test_the_first_chunk_is_printed_at_once_and_repeats_are_bounded(checkpoint_folder, slow, tmp_path, capsys):
    save_observation(tmp_path / "x.npz", {**slow.robot.example()})
    line = ["infer", str(checkpoint_folder), "--observation", str(tmp_path / "x.npz"), "--output", str(tmp_path)]
    assert cli.main([*line, "--repeat", "0", "--dtype", "bfloat16"]) == 0
    assert slow.asked == [""]
    assert slow.given["dtype"] == "bfloat16"
    assert "dx" in capsys.readouterr().out
    slow.asked.clear()
    assert cli.main([*line, "--repeat", "50", "--repeat-seconds", "0"]) == 0
    assert len(slow.asked) == 2
    assert "0.2500" in slow.asked[1]
    assert "saved" in slow.asked[1]
    assert "over 1 calls" in capsys.readouterr().out
    slow.asked.clear()
    assert cli.main([*line, "--repeat", "3"]) == 0
    assert len(slow.asked) == 4
    assert cli.main([*line, "--repeat", "-1"]) == 1


def test_a_template_of_an_observation_reads_no_weights(checkpoint_folder, tmp_path):
    run = shutil.copytree(checkpoint_folder, tmp_path / "run")
    for file in (run / "checkpoints/3/params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert cli.main(["infer", str(run), "--write-example", str(tmp_path / "x")]) == 0
    written = load_observation(tmp_path / "x.npz")
    assert set(written["images"]) == {"top", "tool"}
    assert written["state"].shape == (6,)
