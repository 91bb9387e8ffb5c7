"""A comparison runs its cells in order, each once, and its page says what they measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pi0_jax.compare import cells, learning, report
from pi0_jax.compare.commands import Compare, configure
from pi0_jax.compare.config import Changes, CompareConfig, Contender
from pi0_jax.compare.run import CellFailed, run_cells
from pi0_jax.config import (
    DataConfig,
    Gaussian,
    OptimConfig,
    PolicyConfig,
    Reflow,
    Tokens,
    TrainConfig,
)
from pi0_jax.evaluate.rollout import Outcome, Rollout
from pi0_jax.sampler import Greedy
from tests.conftest import tiny_config

pytest.importorskip("mujoco", reason="the simulator is not installed: pip install -e '.[sim]'")

TABLETOP = "pi0_jax.evaluate.simulators.tabletop"

MODEL = tiny_config(action_dim=6, vocab_size=512, prompt_length=16)


def comparison(folder: Path, **changes) -> CompareConfig:
    """A comparison of two tiny contenders and a straightened one."""
    train = TrainConfig(
        policy=PolicyConfig(robot="tabletop", model=MODEL, normalization="quantile"),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=1, ema_decay=0.9),
        data=DataConfig(str(folder / "data"), str(folder / "held_out")),
        batch_size=8,
        num_steps=2,
    )
    contenders = {
        "reflow": Contender(MODEL, Reflow(teacher="flow"), evaluations=(1,)),
        "flow": Contender(MODEL, Gaussian(), evaluations=(1, 2), ways=("synchronous",)),
        "bins": Contender(MODEL, Tokens(bins=16, dims=3), samplers={"Greedy": Greedy()}, evaluations=(1,)),
    }
    config = CompareConfig(
        train, contenders, Gaussian(regression_draw=True), "tabletop", backbone_steps=2, seeds=(0, 1), episodes=6,
        run_dir=str(folder / "runs"), quick=Changes(seeds=(3,), evaluations=(2,), num_steps=1),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_every_cell_comes_after_those_it_needs(tmp_path):
    config = comparison(tmp_path)
    order = cells.cells(config)
    assert len(order) == len(set(order)) == 7
    for cell in order:
        assert all(order.index(other) < order.index(cell) for other in cells.needs(config, *cell))
    assert cells.needs(config, 1, "reflow") == [(1, "flow")]


def test_contenders_differ_in_what_they_are_and_in_nothing_else(tmp_path):
    config = comparison(tmp_path)
    runs = [cells.training(config, 0, name) for name in ("flow", "bins")]
    assert runs[0].init_from == runs[1].init_from == str(cells.folder(config, 0, cells.BACKBONE))
    same = [dataclasses.replace(r, policy=config.train.policy, run_dir="") for r in runs]
    assert same[0] == same[1]
    straight = cells.training(config, 0, "reflow")
    assert straight.policy.objective.teacher == straight.init_from == str(cells.folder(config, 0, "flow"))


def test_the_command_line_sets_otherwise_and_refuses_what_is_not_there(tmp_path):
    config = comparison(tmp_path)
    quick = configure(config, Compare(Path("x"), quick=True, contenders=("flow", "bins"), episodes=12))
    assert (quick.seeds, quick.train.num_steps, quick.episodes) == ((3,), 1, 12)
    assert {name: c.evaluations for name, c in quick.contenders.items()} == {"flow": (2,), "bins": (1,)}
    assert quick.run_dir != config.run_dir
    with pytest.raises(ValueError, match="Did you mean 'flow'"):
        configure(config, Compare(Path("x"), contenders=("flo",)))
    with pytest.raises(ValueError, match="'flow' is another one's teacher"):
        configure(config, Compare(Path("x"), contenders=("reflow",)))


def test_intervals_over_seeds_are_students():
    interval = report.over_seeds([0.8, 0.9, 1.0], 0.0, 1.0)
    assert interval.mean == pytest.approx(0.9)
    assert interval.low == pytest.approx(0.9 - 4.302653 * 0.1 / np.sqrt(3), rel=1e-5)
    assert interval.high == 1.0
    assert report.over_seeds([0.5]) == (0.5, 0.5, 0.5)


def test_jitter_is_the_third_difference_of_what_was_executed():
    t = np.arange(9.0)[:, None]
    smooth, rough = t**2, (-1.0) ** t

    def of(actions):
        return cells.jitter(Rollout((Outcome(0, "a", 0, "b", True, 9, actions=actions),), 1, (1.0,)))

    assert of(smooth) == pytest.approx(0, abs=1e-18)
    assert of(rough) == pytest.approx(64)


def test_a_loop_is_covered_by_chunks_longer_than_their_latency():
    waiting, beside = report.coverage(0.1, 10, 100.0)
    assert (waiting, beside) == (0.5, 1.0)
    assert report.coverage(0.1, 10, 500.0)[1] == pytest.approx(0.2)


def test_a_cell_that_fails_is_named_with_its_log_and_nothing_else_is_lost(tmp_path):
    config = comparison(tmp_path, seeds=(0,))
    with pytest.raises(CellFailed, match=r"seed 0, backbone failed with exit code .*log is .*backbone\.txt") as error:
        run_cells(config, ["compare", str(tmp_path / "none.py")], 1)
    assert "there is no config" in str(error.value)
    with pytest.raises(ValueError, match="nothing to compare"):
        report.write_comparison(config)


def test_cells_train_measure_and_make_a_page(tmp_path, monkeypatch):
    from pi0_jax.evaluate.record import Source, record

    monkeypatch.setattr(cells, "BATCH", 6)
    monkeypatch.setattr(cells, "STRAIGHTNESS_STEPS", 2)
    monkeypatch.setattr(cells, "CONTROL_STEPS", (2,))
    monkeypatch.setattr(report, "CONTROL_STEPS", (2,))
    for module in (cells, report):
        monkeypatch.setattr(module, "HORIZONS", (6,))
    record(tmp_path / "data", Source("tabletop_detour"), 6)
    record(tmp_path / "held_out", Source("tabletop_detour", "validation"), 6)
    monkeypatch.setattr(f"{TABLETOP}.gantry.MAX_STEPS", 12)  # policies that have learnt nothing act to the end
    how = {"env": "tabletop_detour", "env_options": {"repeats": 2}, "latencies": (400,), "measure_every": 1}
    config = comparison(tmp_path, seeds=(0,), **how)
    config = dataclasses.replace(config, contenders={n: c for n, c in config.contenders.items() if n != "reflow"})
    for cell in cells.cells(config):
        cells.run_cell(config, *cell)
        assert cells.is_done(config, *cell)
    flow = json.loads((cells.folder(config, 0, "flow") / "cell.json").read_text())
    assert [row["evaluations"] for row in flow["rows"]] == [1, 2]
    assert all(row["episodes"] == 6 and row["error"] > 0 and row["latency_ms"] > 0 for row in flow["rows"])
    assert flow["straightness"]["Euler"] > 0
    assert sum(flow["demonstrated"].values()) == 6
    assert [point["step"] for point in flow["curve"]] == [1, 2]
    assert flow["curve"][1]["successes"] == flow["rows"][1]["successes"]
    assert [(row["way"], row["latency_ms"]) for row in flow["delays"]] == [("synchronous", 400)]
    assert flow["delays"][0]["held"] >= 2  # two steps of a fifth of a second, at least once
    page = report.write_comparison(config).read_text()
    assert page.count("<img") == 5
    assert "How soon does each follow" in page
    assert "Which of the right ways?" in page
    assert "What does delay do?" in page
    figures = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert set(figures["policies"]) == {"flow", "bins"}
    assert figures["policies"]["bins"]["straightness"] is None


def test_contenders_may_start_at_random_and_have_data_of_their_own(tmp_path):
    own = Contender(MODEL, Gaussian(), changes={"data.path": "elsewhere", "policy.execute_steps": 2})
    config = comparison(tmp_path, backbone=None, measure_every=1, contenders={"own": own})
    assert cells.cells(config) == [(0, "own"), (1, "own")]
    assert cells.needs(config, 0, "own") == []
    train = cells.training(config, 1, "own")
    assert (train.init_from, train.data.path, train.policy.execute_steps) == (None, "elsewhere", 2)
    assert train.save_every == train.keep_every == 1


def test_the_updates_until_a_policy_follows_are_those_of_each_seed():
    def cell(*successes):
        return {"curve": [{"step": 100 * (i + 1), "successes": n, "episodes": 10} for i, n in enumerate(successes)]}

    found = learning.summary([cell(1, 5, 9), cell(4, 4, 6)], 0.5)
    assert found is not None
    assert found["learnt_at"] == [200, 300]
    assert [round(values[0], 2) for values in found["success"].values()] == [0.25, 0.45, 0.75]
    never = learning.summary([cell(1, 1)], 0.5)
    assert never is not None
    assert never["learnt_at"] == [None]
    assert learning.summary([{"curve": []}, {}], 0.5) is None
    ((_, picture, text),) = learning.section(
        {"a": {"learning": found}, "b": {"learning": never}, "c": {"learning": None}}, 0.5, report.over_seeds
    )
    assert picture is not None
    assert "250 [" in text
    assert "never" in text
