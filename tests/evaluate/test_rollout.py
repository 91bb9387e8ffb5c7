import dataclasses
import io
import re

import av
import jax
import numpy as np
import pytest

from pi0_jax.config import Tokens
from pi0_jax.evaluate import report
from pi0_jax.evaluate.page import encode_mp4, hold_last
from pi0_jax.evaluate.rollout import roll_out, success_rate
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.inference.policy import Policy
from pi0_jax.sampler import Greedy
from tests.policies import TINY, save_tiny_checkpoint

pytest.importorskip("mujoco", reason="the simulator is not installed: pip install -e '.[sim]'")

TABLETOP = "pi0_jax.evaluate.simulators.tabletop"


@pytest.fixture(scope="module")
def simulator():
    return get_simulator("tabletop")


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


def test_every_episode_is_run_once_and_tasks_take_turns(policy, simulator):
    scripted = Scripted(policy)
    result = roll_out(scripted, simulator, 8, batch_size=3)
    assert [outcome.index for outcome in result.outcomes] == list(range(8))
    assert [outcome.task for outcome in result.outcomes] == [simulator.tasks[i % 6] for i in range(8)]
    assert {outcome.num_steps for outcome in result.outcomes} == {40}  # an arm that rests never succeeds
    assert {size for size, _ in scripted.batches} == {3}
    assert result.rates()["all"][:2] == (0, 8)


def test_outcomes_do_not_depend_on_the_batch_size(policy, simulator):
    one, other = (roll_out(policy, simulator, 5, seed=3, batch_size=size) for size in (2, 5))
    assert [(o.prompt, o.success, o.num_steps) for o in one.outcomes] == [
        (o.prompt, o.success, o.num_steps) for o in other.outcomes
    ]


def test_a_counterfactual_instruction_names_another_object(simulator):
    counterfactual = get_simulator("tabletop", counterfactual=True)
    for index in range(12):
        plain, other = (each.start(index, 0) for each in (simulator, counterfactual))
        assert plain.task == other.task
        thing = plain.task.split("_", 1)[1].replace("_", " ")
        assert thing in plain.observe()["prompt"]
        assert thing not in other.observe()["prompt"]
        np.testing.assert_array_equal(plain.observe()["images"]["top"], other.observe()["images"]["top"])


def test_wilson_interval_equals_its_formula():
    z, k, n = 1.959964, 47, 50
    p = k / n
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(
        success_rate(k, n)[3:], (np.array([center - half, center + half])) / (1 + z**2 / n), rtol=1e-6
    )
    assert success_rate(50, 50).low < 1


def test_the_table_has_a_row_a_task_and_the_latency(policy, simulator):
    text = roll_out(policy, simulator, 6, batch_size=6).table()
    for task in (*simulator.tasks, "all"):
        assert re.search(rf"^{task} +\d+ of ", text, re.MULTILINE)
    assert "p50" in text


def test_an_unknown_environment_and_another_robots_policy_are_refused(policy, simulator):
    with pytest.raises(ValueError, match=r"there are .*tabletop, tabletop_centre.*Did you mean 'tabletop'"):
        get_simulator("tabeltop")
    with pytest.raises(ValueError, match=r"for the robot 'tabletop'; the environment has 'aloha'"):
        roll_out(policy, dataclasses.replace(simulator, robot="aloha"), 1)


def test_the_report_is_one_file_with_everything_in_it(policy, checkpoint_folder, simulator, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "STEPS", (policy.config.sampler.num_steps, 1))
    monkeypatch.setattr(f"{TABLETOP}.gantry.MAX_STEPS", 8)  # the policy has learnt nothing, and acts to the end
    (checkpoint_folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {1 / i}, "grad_norm": 1.0}}\n' for i in range(1, 5))
        + '{"step": 4, "validation_loss": 0.5}\n'
    )
    counterfactual = get_simulator("tabletop", counterfactual=True)
    # Hundreds of thousands of rays per picture are most of the work of films.
    simulator = dataclasses.replace(simulator, picture=lambda env: env.unwrapped.draw_view(size=32))
    figures = report.write_report(policy, checkpoint_folder, simulator, counterfactual, 2, 0, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)=["\'](?!data:)', page)
    assert page.count("<video") == 2
    for title in (
        "Success by instruction",
        "Counterfactual instructions",
        "Compute against accuracy",
        "From noise to a chunk",
        "Training",
    ):
        assert title in page
    assert set(figures["success_by_steps"]) == {1, policy.config.sampler.num_steps}
    assert (tmp_path / "report.json").is_file()


def test_the_report_of_a_policy_that_decodes_tokens_has_no_solver_steps(simulator, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{TABLETOP}.gantry.MAX_STEPS", 8)
    decoder = dataclasses.replace(TINY, objective=Tokens(bins=6), sampler=Greedy(), normalization="quantile")
    folder = save_tiny_checkpoint(tmp_path / "tokens", policy=decoder)
    simulator = dataclasses.replace(simulator, picture=lambda env: env.unwrapped.draw_view(size=32))
    figures = report.write_report(Policy.load(folder), folder, simulator, None, 1, 0, tmp_path / "report.html")
    assert set(figures["success_by_steps"]) == {report.DECODED}
    page = (tmp_path / "report.html").read_text()
    assert "its tokens decoded" in page
    assert "From noise to a chunk" not in page


def test_videos_hold_their_last_picture():
    pictures = [np.full((16, 16, 3), i * 40, np.uint8) for i in range(5)]
    with av.open(io.BytesIO(encode_mp4(hold_last(pictures, 5), fps=5))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 10
    assert abs(int(frames[-1].mean()) - 160) < 6
