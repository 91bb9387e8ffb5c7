"""Statistics of a file against the demonstrations: those of the same data fit in both modes, those of another not."""

import dataclasses
import json
import re

import numpy as np
import pytest

from pi0_jax import cli
from pi0_jax.config import DataConfig, ModelConfig, PolicyConfig, TrainConfig
from pi0_jax.config.policy import Normalization
from pi0_jax.data.mixture import open_datasets
from pi0_jax.data.normalization import save_json, select_dims, stats_to_json
from pi0_jax.data.source import Source
from pi0_jax.data.tools.given import EPISODES, fit_given, some_episodes
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.errors import UserError
from pi0_jax.training.inputs import _normalizations
from tests.data.test_check import NAMES, record

HORIZON = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four episodes of an SO-101 whose joints are relative."""
    policy = PolicyConfig(robot="so101", model=ModelConfig(action_horizon=HORIZON))
    (found,) = open_datasets(DataConfig(str(record(tmp_path_factory.mktemp("given") / "data"))), policy)
    return found


@pytest.fixture(scope="module")
def own(dataset):
    return compute_normalizations([dataset], HORIZON)["so101"].stats


def changed(stats, key, dim, **changes):
    """Statistics with one dimension changed: `name=(factor, offset in deviations)`."""
    entry = stats[key]
    values = {name: getattr(entry, name).copy() for name in changes}
    for name, (factor, offset) in changes.items():
        values[name][dim] = factor * values[name][dim] + offset * entry.std[dim]
    return stats | {key: entry._replace(**values)}


def fit(dataset, stats, mode: Normalization = "zscore"):
    return fit_given(dataset, stats, mode, HORIZON, dataset.training)


@pytest.mark.parametrize(("mode", "share"), [("zscore", 0.5), ("quantile", 0.03)])
def test_statistics_of_the_same_data_fit(dataset, own, mode, share):
    found = fit(dataset, own, mode)
    assert found.far_off == []
    assert 0 < found.outside < share
    assert 1 < found.largest < 10


def test_a_shift_that_another_task_may_have_is_no_problem(dataset, own):
    assert fit(dataset, changed(own, "state", 2, mean=(1, 2))).far_off == []


def test_a_far_dimension_is_named_with_its_numbers(dataset, own):
    (found,) = fit(dataset, changed(own, "state", 2, mean=(1, 50))).far_off
    assert re.fullmatch(r"state elbow_flex\.pos \(100% outside \[-1, 1\], up to 5\d(\.\d)?\)", found)
    (found,) = fit(dataset, changed(own, "actions", 5, std=(1e-3, 0))).far_off
    assert found.startswith("actions gripper.pos (")


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
def test_statistics_that_squeeze_most_dimensions_are_named(dataset, own, mode):
    """Radians by statistics of degrees; a single joint that a task leaves alone is none of it."""
    wide = {key: entry._replace(**{k: 57.3 * v for k, v in entry._asdict().items()}) for key, entry in own.items()}
    found = fit(dataset, wide, mode).far_off
    assert {name.split(" (")[0] for name in found} == {f"{key} {name}" for key in own for name in NAMES}
    assert re.fullmatch(r"state \S+ \(98 % of the values in 0\.0\d+ of \[-1, 1\]\)", found[0])
    alone = own["state"]._replace(**{k: np.array([57.3 * v[0], *v[1:]]) for k, v in own["state"]._asdict().items()})
    assert fit(dataset, own | {"state": alone}, mode).far_off == []


def test_relative_actions_are_held_against_their_differences(dataset, own):
    absolute = dataset._replace(semantics=(*["absolute"] * 5, "gripper"))
    assert fit(absolute, own).largest > 1.5 * fit(dataset, own).largest


def test_a_rare_gripper_is_refused_by_the_quantiles_of_openpi(dataset, own):
    """Their range is empty, so that one frame in hundreds is normalised to a million; our file knows the range."""
    stats = {key: entry._replace(min=None, max=None) for key, entry in own.items()}
    gripper = stats["actions"]._replace(q99=np.where(np.arange(6) == 5, stats["actions"].q01, stats["actions"].q99))
    (found,) = fit(dataset, stats | {"actions": gripper}, "quantile").far_off
    assert found.startswith("actions gripper.pos")


def test_statistics_of_other_dimensions_are_refused(dataset, own):
    short = {key: select_dims(entry, range(5)) for key, entry in own.items()}
    with pytest.raises(UserError, match="have 5 dimensions; the robot has 6"):
        fit(dataset, short)


def test_training_looks_at_some_episodes_of_many(dataset, monkeypatch):
    many = dataset._replace(training=np.arange(1000))
    monkeypatch.setattr(dataset.source, "ends", 500 * np.arange(1, 1001))
    chosen = some_episodes(many)
    assert len(chosen) == EPISODES
    assert (chosen[0], chosen[-1]) == (0, 999)
    monkeypatch.setattr(dataset.source, "ends", 15_000 * np.arange(1, 1001))
    assert len(some_episodes(many)) == 1
    assert not len(some_episodes(dataset._replace(training=np.arange(0))))


def test_training_refuses_them_unless_they_are_trusted_and_decodes_nothing(dataset, own, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Source, "image", lambda *_: pytest.fail("decoded a frame"))
    caplog.set_level("INFO")
    path = tmp_path / "norm_stats.json"
    save_json(stats_to_json(own), path)
    data = DataConfig(str(dataset.source.root), norm_stats=str(path))
    config = TrainConfig(policy=PolicyConfig(robot="so101", model=ModelConfig(action_horizon=HORIZON)), data=data)
    assert list(_normalizations(config, [dataset], None)) == ["so101"]
    assert re.search(r"normalises 4 episodes of .*: \d+ % of the values outside \[-1, 1\]", caplog.text)
    save_json(stats_to_json(changed(own, "state", 2, mean=(1, 50))), path)
    with pytest.raises(UserError, match=r"far off: state elbow_flex\.pos .*--data\.trust-norm-stats"):
        _normalizations(config, [dataset], None)
    trusted = dataclasses.replace(config, data=dataclasses.replace(data, trust_norm_stats=True))
    assert list(_normalizations(trusted, [dataset], None)) == ["so101"]
    assert "data.trust_norm_stats is set" in caplog.text


def test_the_check_command_names_them(dataset, own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norm_stats.json").write_text(json.dumps(stats_to_json(changed(own, "state", 2, mean=(1, 50)))))
    (tmp_path / "config.py").write_text(
        "from pi0_jax.config import *\n"
        f"config = TrainConfig(policy=PolicyConfig(robot='so101', model=ModelConfig(action_horizon={HORIZON})), "
        f"data=DataConfig({str(dataset.source.root)!r}, norm_stats='norm_stats.json'))\n"
    )
    assert cli.main(["data", "check", "config.py"]) == 1
    error = capsys.readouterr().err
    assert "norm_stats.json is far off: state elbow_flex.pos (100% outside" in error
    assert NAMES[0] not in error


def test_many_far_dimensions_are_one_problem(dataset, own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved = {key: entry._replace(mean=entry.mean + 50 * entry.std) for key, entry in own.items()}
    save_json(stats_to_json(moved), tmp_path / "norm_stats.json")
    (tmp_path / "config.py").write_text(
        "from pi0_jax.config import *\n"
        "config = TrainConfig(policy=PolicyConfig(robot='so101'), "
        f"data=DataConfig({str(dataset.source.root)!r}, norm_stats='norm_stats.json'))\n"
    )
    assert cli.main(["data", "check", "config.py"]) == 1
    error = capsys.readouterr().err
    assert error.count("is far off") == 1
    assert " and 4 more" in error
