"""Which of several right ways was taken, and how that is held against the demonstrations."""

import json
from pathlib import Path

import pytest

from pi0_jax.compare.behaviour import mode_coverage, modes, recorded_modes
from pi0_jax.compare.cells import training
from pi0_jax.compare.config import CompareConfig
from pi0_jax.config_file import load_config
from pi0_jax.evaluate.latency import STRATEGIES
from pi0_jax.evaluate.rollout import Outcome, Rollout
from pi0_jax.evaluate.simulators import get_simulator

CONFIGS = Path(__file__).parents[2] / "configs"


def rollout(*episodes: tuple[int, str | None, bool]) -> Rollout:
    """Of the layout's seed, the mode and the success of each episode."""
    found = [Outcome(i, "a", seed, "b", won, 9, mode) for i, (seed, mode, won) in enumerate(episodes)]
    return Rollout(tuple(found), 1, (1.0,))


def test_modes_are_counted_over_successes_and_compared_within_layouts():
    episodes = [(0, "left", True), (0, "right", True), (1, "left", True), (1, "left", True), (2, "right", False)]
    assert modes(rollout(*episodes, (2, "left", True)), ("left", "right")) == {
        "modes": {"left": 4, "right": 1},
        "pairs": [1, 2],
    }
    assert modes(rollout((0, None, True)), ()) == {"modes": {}, "pairs": [0, 0]}


@pytest.mark.parametrize(
    ("taken", "coverage"), [((5, 5), 1.0), ((10, 0), 0.5), ((0, 7), 0.5), ((3, 1), 0.75), ((0, 0), 0.0)]
)
def test_coverage_is_the_overlap_with_the_demonstrations(taken, coverage):
    assert mode_coverage({"left": taken[0], "right": taken[1]}, {"left": 30, "right": 30}) == pytest.approx(coverage)


def test_modes_of_demonstrations_are_read_where_they_were_recorded(tmp_path):
    assert recorded_modes(tmp_path, ("left", "right")) is None
    (tmp_path / "meta").mkdir()
    episodes = [{"task": "a", "seed": 0, "mode": "left"}, {"task": "a", "seed": 1, "mode": "left"}]
    (tmp_path / "meta" / "recording.json").write_text(json.dumps({"episodes": episodes}))
    assert recorded_modes(tmp_path, ("left", "right")) == {"left": 2, "right": 0}
    assert recorded_modes(tmp_path, ()) is None


@pytest.mark.parametrize("task", ["detour", "insertion", "chase"])
def test_the_three_tasks_have_a_comparison(task):
    pytest.importorskip("mujoco", reason="the simulator is not installed: pip install -e '.[sim]'")
    config = load_config(CONFIGS / f"compare_{task}.py", CompareConfig)
    simulator = get_simulator(config.env, **config.env_options)
    assert config.env == f"tabletop_{task}"
    assert config.episodes >= 200
    for contender in config.contenders.values():
        assert contender.model.cameras == config.train.policy.model.cameras
        assert set(contender.ways) <= set(STRATEGIES)
    assert bool(simulator.modes) == (task == "detour")
    seeds = [simulator.start(index, 0).seed for index in range(4)]
    assert len(set(seeds)) == (2 if task == "detour" else 4)


def test_the_comparison_of_recipes_is_of_policies_that_can_act():
    pytest.importorskip("mujoco", reason="the simulator is not installed: pip install -e '.[sim]'")
    config = load_config(CONFIGS / "compare_recipes.py", CompareConfig)
    simulator = get_simulator(config.env)
    assert simulator.subtask is not None
    assert simulator.questions is not None
    runs = {name: training(config, 0, name) for name in config.contenders}
    for run in runs.values():
        run.policy.check()
        assert run.init_from is None
        assert run.num_steps % run.save_every == 0
    assert runs["joint-subtasks"].policy.subtask_every == 1
    assert [each.path for each in runs["few-pairs"].data.datasets] == ["data/stages-few", "data/stages-questions"]
    assert runs["flow"].data.path == config.train.data.path
