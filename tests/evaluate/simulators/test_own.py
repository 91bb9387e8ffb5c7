"""The simulator of docs/evaluation.md is one file, here of gymnasium-robotics, in whatever interpreter has that."""

import re
from pathlib import Path

import numpy as np
import pytest

from pi0_jax.cli import main
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.robots import get_robot
from tests.evaluate.simulators.opened import opened, python_of

PAGE = (Path(__file__).parents[3] / "docs/evaluation.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the page's files."""
    folder = tmp_path_factory.mktemp("own")
    for name, block in zip(("fetch", "fetch_robot"), re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), strict=True):
        (folder / f"{name}.py").write_text(block)
    return folder


def test_the_pages_robot_is_one(folder):
    assert get_robot(str(folder / "fetch_robot.py")).name == "fetch"


def test_the_pages_expert_reaches_and_is_recorded(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for simulator in opened("fetch.py", {}):
        episode = simulator.start(0, 0)
        assert episode.observe()["images"]["base_0_rgb"].shape == (96, 96, 3)
        assert episode.step(np.zeros(4)) == (False, False)
    arguments = ["--env", "fetch.py", "--env-python", str(python_of("fetch.py")), "--episodes", "2", "--noise", "0"]
    assert main(["record", "data", *arguments]) == 0
    dataset = LeRobotDataset("data")
    assert dataset.num_episodes == 2
    assert np.abs(dataset.columns("action")).max() <= 1
