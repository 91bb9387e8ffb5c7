import io
import re

import av
import jax
import numpy as np
import pytest

from pi0_jax.evaluate import report
from pi0_jax.evaluate.rollout import roll_out, table, wilson
from pi0_jax.evaluate.simulators.suites import get_suite
from pi0_jax.inference.policy import Policy

pytest.importorskip("mujoco", reason="the simulator is not installed: pip install pi0_jax[sim]")


@pytest.fixture(scope="module")
def suite():
    return get_suite("tabletop")


@pytest.fixture(scope="module")
def policy(checkpoint_folder):
    return Policy.load(checkpoint_folder)


class Scripted:
    """Stands for a policy, and plays the expert's actions, so that the loop itself is tested."""

    def __init__(self, policy):
        self.robot, self.config = policy.robot, policy.config
        self.batches = []

    def infer_batch(self, observations, keys, num_steps=None):
        self.batches.append((len(observations), np.asarray(jax.random.key_data(keys))))
        self.prompts = [observation["prompt"] for observation in observations]
        return np.zeros((len(observations), self.config.model.action_horizon, 3), np.float32)


def test_every_episode_is_run_once_and_tasks_take_turns(policy, suite):
    scripted = Scripted(policy)
    result = roll_out(scripted, suite, 8, batch_size=3)
    assert [outcome.index for outcome in result.outcomes] == list(range(8))
    assert [outcome.task for outcome in result.outcomes] == [suite.tasks[i % 6] for i in range(8)]
    assert {outcome.num_steps for outcome in result.outcomes} == {40}  # an arm that rests never succeeds
    assert {size for size, _ in scripted.batches} == {3}
    assert result.rates()["all"] == (0, 8)


def test_outcomes_do_not_depend_on_the_batch_size(policy, suite):
    one, other = (roll_out(policy, suite, 5, seed=3, batch_size=size) for size in (2, 5))
    assert [(o.prompt, o.success, o.num_steps) for o in one.outcomes] == [
        (o.prompt, o.success, o.num_steps) for o in other.outcomes
    ]


def test_a_distracting_instruction_names_another_object(suite):
    for index in range(12):
        plain, distracting = (suite.start(index, 0, distract=distract) for distract in (False, True))
        assert plain.task == distracting.task
        thing = plain.task.split("_", 1)[1].replace("_", " ")
        assert thing in plain.prompt
        assert thing not in distracting.prompt


def test_wilson_interval_equals_its_formula():
    z, k, n = 1.959964, 47, 50
    p = k / n
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(wilson(k, n), (np.array([center - half, center + half])) / (1 + z**2 / n), rtol=1e-6)
    assert wilson(50, 50)[0] < 1


def test_the_table_has_a_row_a_task_and_the_latency(policy, suite):
    text = table(roll_out(policy, suite, 6, batch_size=6))
    for task in (*suite.tasks, "all"):
        assert re.search(rf"^{task} +\d+ of ", text, re.MULTILINE)
    assert "p50" in text


def test_an_unknown_environment_and_another_robots_policy_are_refused(policy, suite):
    with pytest.raises(ValueError, match="there are tabletop, tabletop_centre"):
        get_suite("tabeltop")
    suite_of_another = type("Suite", (), {"robot": "aloha"})()
    with pytest.raises(ValueError, match=r"for the robot 'tabletop'; the environment has 'aloha'"):
        roll_out(policy, suite_of_another, 1)


def test_the_report_is_one_file_with_everything_in_it(policy, checkpoint_folder, suite, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "STEPS", (2, 1))
    (checkpoint_folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {1 / i}, "grad_norm": 1.0}}\n' for i in range(1, 5))
        + '{"step": 4, "validation_loss": 0.5}\n'
    )
    figures = report.write_report(policy, checkpoint_folder, suite, 2, 0, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)=["\'](?!data:)', page)
    assert page.count("<video") == 2
    for title in ("Success by instruction", "Compute against accuracy", "From noise to a chunk", "Training"):
        assert title in page
    assert set(figures["success_by_steps"]) == {1, 2}
    assert (tmp_path / "report.json").is_file()


def test_videos_hold_their_last_picture():
    pictures = [np.full((16, 16, 3), i * 40, np.uint8) for i in range(5)]
    with av.open(io.BytesIO(report.encode_mp4(pictures, fps=5))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 10
    assert abs(int(frames[-1].mean()) - 160) < 6
