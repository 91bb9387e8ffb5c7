"""The model card says what is on record about a policy, and no more."""

import dataclasses
import json
import re

import pytest

from pi0_jax.config import DataConfig, DatasetConfig, TrainConfig
from pi0_jax.convert.formats import open_checkpoint, write_checkpoint
from pi0_jax.convert.run import convert
from tests.convert.common import STATS, save_tiny, tiny_weights

RATE = {"successes": 180, "episodes": 200, "rate": 0.9, "low": 0.85, "high": 0.93}


def front(folder) -> dict:
    """The YAML of a card. All its values are JSON, which is YAML."""
    match = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(), re.DOTALL)
    lines = (line.partition(": ") for line in match.group(1).splitlines())
    return {key: json.loads(value) for key, _, value in lines}


@pytest.fixture
def run(tmp_path):
    """A run of 3000 steps on a dataset of the hub and one of this machine, with the success that was measured."""
    folder = tmp_path / "runs/fold"
    weights = tiny_weights("pi05")
    data = DataConfig(datasets=(DatasetConfig("hf://owner/towels"), DatasetConfig("/home/someone/data/more")))
    train = TrainConfig(policy=weights.policy, data=data, num_steps=3000, batch_size=16)
    stats = STATS | {"action_semantics": {"arm": ["relative", "gripper"]}}
    write_checkpoint(weights._replace(train=train, norm_stats=stats), folder / "checkpoints/3000", "pi0")
    report = {"step": 3000, "simulator": "folding", "seed": 1, "device": "cpu", "success": {"fold": RATE, "all": RATE}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_a_card_has_robot_data_steps_and_measured_success(run, tmp_path):
    target = tmp_path / "policy"
    convert(run, target, "lerobot", license="apache-2.0")
    assert front(target) == {
        "license": "apache-2.0",
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "tags": ["lerobot", "robotics", "pi05", "pi0_jax"],
        "datasets": ["owner/towels"],
    }
    text = (target / "README.md").read_text()
    for said in (
        "# policy\n",
        "| robot | arm |",
        "| action dimensions | 2 |",
        "| data | hf://owner/towels, more |",
        "| steps | 3,000 of 3,000 |",
        "| fold | 180 | 200 | 90.0% | 85.0% to 93.0% |",
        "simulator `folding`",
        "**1 action dimension is a difference to the state",
        'PI05Policy.from_pretrained("OWNER/policy")',
    ):
        assert said in text, said
    assert "/home/someone" not in text
    assert open_checkpoint(target).policy.model == open_checkpoint(run).policy.model


def test_success_of_another_step_is_not_claimed_and_none_is_said_to_be_none(run, tmp_path):
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"step": 2000}))
    convert(run, tmp_path / "other", "lerobot")
    assert "those of step 2000" in (tmp_path / "other/README.md").read_text()
    assert "90.0%" not in (tmp_path / "other/README.md").read_text()
    convert(save_tiny(tmp_path / "ours", "pi0"), tmp_path / "none", "lerobot")
    text = (tmp_path / "none/README.md").read_text()
    assert "Not measured." in text
    assert "how they were trained is not known" in text


def test_a_licence_is_never_made_up_and_follows_the_weights(run, tmp_path, caplog):
    convert(run, tmp_path / "a", "lerobot")
    assert "license" not in front(tmp_path / "a")
    assert "Not known." in (tmp_path / "a/README.md").read_text()
    assert "nothing says under which licence the weights are; --license" in caplog.text

    # From the model card of released weights into ours, by the training that began with them, and out again.
    convert(save_tiny(tmp_path / "tiny", "pi05"), tmp_path / "released", "lerobot", license="gemma")
    convert(tmp_path / "released", tmp_path / "base")
    began = open_checkpoint(run)
    train = dataclasses.replace(began.train, init_from=str(tmp_path / "base"))
    write_checkpoint(began._replace(train=train), tmp_path / "runs/second/checkpoints/10", "pi0")
    convert(tmp_path / "runs/second", tmp_path / "out", "lerobot")
    assert front(tmp_path / "out")["license"] == "gemma"
    assert "\ngemma.\n" in (tmp_path / "out/README.md").read_text()
