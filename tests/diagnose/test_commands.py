"""`pi0 diagnose` writes its page from a run folder and held-out episodes, and says what it lacks."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from pi0_jax import cli
from pi0_jax.checkpoint import load_assets
from pi0_jax.config import DataConfig, TrainConfig
from pi0_jax.diagnose.commands import Diagnose, open_data
from pi0_jax.errors import UserError
from tests.data.conftest import write
from tests.policies import TINY, save_tiny_checkpoint

FEW = ["--frames", "12", "--train-frames", "8", "--moments", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose training and validation data are there."""
    folder = tmp_path_factory.mktemp("diagnose")
    data = DataConfig(str(write(folder / "data")), validation_path=str(write(folder / "held_out", (5, 6, 7))))
    return save_tiny_checkpoint(folder / "run", train=TrainConfig(policy=TINY, data=data))


def test_the_page_and_its_figures_are_written(run, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["diagnose", str(run), *FEW]) == 0
    page, figures = (run / "diagnose.html").read_text(), json.loads((run / "diagnose.json").read_text())
    assert figures["episodes"] == 3
    assert figures["chunks"] <= 12
    assert [use["name"] for use in figures["uses"]] == ["instruction", "top", "top", "tool", "tool", "state"]
    assert figures["training_error"] > 0
    assert figures["nearness"]["frames"] == 8
    assert sum(figures["attention"].values()) == pytest.approx(1, abs=1e-4)
    assert set(figures["attention"]) == {"camera top", "camera tool", "prompt", "state and actions"}
    printed = capsys.readouterr().out
    for finding in figures["findings"]:
        assert finding["sentence"] in printed
    assert page.rindex("What to do") > page.rindex("Worst moments")
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]+"', page)  # one file, which needs no other
    assert page.count('alt="attention"') == 2 * 2


def opened(run, config: DataConfig, **flags):
    """The data of a run whose configuration has other ones."""
    assets = load_assets(run)
    return open_data(assets._replace(train=dataclasses.replace(assets.train, data=config)), Diagnose(run, **flags))


def test_a_run_without_held_out_episodes_is_told_how_to_get_some(run):
    data = load_assets(run).train.data
    with pytest.raises(UserError, match=r"held out no episodes.*--data FOLDER.*--data.validation-share"):
        opened(run, DataConfig(data.path))
    held_out, training = opened(run, DataConfig(data.path), data=Path(data.validation_path))
    assert [len(each.held_out) for each in held_out] == [3]
    assert [len(each.training) for each in training] == [5]


def test_data_that_are_elsewhere_are_asked_for_or_done_without(run, tmp_path, caplog):
    data = load_assets(run).train.data
    with pytest.raises(FileNotFoundError, match=r"moved.*--data FOLDER"):
        opened(run, DataConfig(data.path, validation_path=str(tmp_path / "moved")))
    held_out, training = opened(run, DataConfig(str(tmp_path / "gone"), validation_path=data.validation_path))
    assert (len(held_out), training) == (1, [])
    assert "without the training data" in caplog.text
    assert opened(run, data, train_frames=0)[1] == []


def test_a_share_of_the_episodes_is_what_training_held_out(run):
    ((held_out,), (training,)) = opened(run, DataConfig(load_assets(run).train.data.path, validation_share=0.5))
    assert held_out.source.root == training.source.root
    assert not {*held_out.held_out.tolist()} & {*training.training.tolist()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "0"], "--frames is 0"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--output", "/no/folder/page.html"], "--output"),
    ],
)
def test_impossible_flags_are_refused(run, flags, message, capsys):
    assert cli.main(["diagnose", str(run), *flags]) == 1
    assert message in capsys.readouterr().err


def test_there_is_a_message_for_a_run_that_is_not_there(tmp_path, capsys):
    assert cli.main(["diagnose", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
