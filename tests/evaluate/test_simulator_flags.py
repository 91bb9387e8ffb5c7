"""Which simulator, and which of its options, a run is evaluated in where the flags do not say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pi0_jax.config import DataConfig, DatasetConfig, TrainConfig
from pi0_jax.errors import UserError
from pi0_jax.evaluate import simulator_flags
from pi0_jax.evaluate.commands import Evaluate, Report
from pi0_jax.evaluate.simulator_flags import parse_options, with_simulator
from tests.policies import TINY


@pytest.fixture
def trained_on(tmp_path, monkeypatch):
    """Makes the run be one that was trained on datasets recorded in these ways; None: none was recorded."""

    def train(*stories):
        datasets = []
        for number, story in enumerate(stories):
            (tmp_path / f"{number}" / "meta").mkdir(parents=True)
            if story is not None:
                (tmp_path / f"{number}" / "meta/recording.json").write_text(json.dumps(story))
            datasets.append(DatasetConfig(str(tmp_path / f"{number}")))
        config = TrainConfig(policy=TINY, data=DataConfig(datasets=tuple(datasets)))
        assets = SimpleNamespace(train=config, policy=TINY, robot=None)
        monkeypatch.setattr(simulator_flags, "load_assets", lambda _: assets)

    return train


STAGES = {"simulator": "tabletop_stages", "options": [["image_size", 64]]}
DETOUR = {"simulator": "tabletop_detour", "options": {"repeats": 2, "name": "a=b", "code": "12"}}
RUN = Path("run")


def test_a_run_is_evaluated_as_its_demonstrations_were_recorded(trained_on, capsys):
    trained_on(None, {"source": "a teleoperator"}, STAGES, DETOUR)
    args = with_simulator(Report(RUN, seed=3))
    assert (args.env, args.env_options, args.seed) == ("tabletop_stages", ("image_size=64",), 3)
    said = capsys.readouterr().out
    assert "simulator tabletop_stages image_size=64, as " in said
    assert "2 was recorded" in said
    args = with_simulator(Evaluate(RUN, env="tabletop_detour"))
    assert parse_options(args.env_options) == DETOUR["options"]
    assert "trained on" not in said


def test_layouts_of_rollouts_that_a_run_was_trained_on_are_named(trained_on, capsys):
    trained_on(STAGES, {**STAGES, "policy": "runs/first", "seed": 7})
    with_simulator(Evaluate(RUN, seed=7))
    assert "1, rollouts of seed 7; --seed gives other layouts" in capsys.readouterr().out
    with_simulator(Evaluate(RUN, seed=8))
    assert "trained on" not in capsys.readouterr().out


def test_flags_come_before_what_was_recorded(trained_on, capsys):
    trained_on(STAGES)
    args = with_simulator(Report(RUN, env="tabletop_stages", env_options=("image_size=32", "other=true")))
    assert set(args.env_options) == {"image_size=32", "other=true"}
    args = with_simulator(Report(RUN, env="tabletop"))
    assert (args.env, args.env_options) == ("tabletop", ())
    assert not capsys.readouterr().out


def test_the_robots_simulator_is_taken_where_nothing_was_recorded(trained_on):
    trained_on()
    assert with_simulator(Report(RUN)).env == "tabletop"
    trained_on({"simulator": "somewhere/else.py", "options": []})  # its file is not here
    assert with_simulator(Report(RUN)).env == "tabletop"
    with pytest.raises(UserError, match="expected NAME=VALUE"):
        with_simulator(Report(RUN, env_options=("image_size",)))
