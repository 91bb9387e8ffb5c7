"""Simulated time: what is late, lost or unsteady, and the figures that come of it."""

import dataclasses

import numpy as np
import pytest

from pi0_client.player import real_time, receding_horizon
from pi0_jax.config import RealTimeConfig
from pi0_jax.evaluate.commands import Evaluate, evaluate
from pi0_jax.evaluate.latency import STRATEGIES, Latency, Trace, simulate, summary
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.inference.policy import Policy

pytest.importorskip("mujoco", reason="the simulator is not installed: pip install -e '.[sim]'")


@pytest.fixture(scope="module")
def simulator():
    return get_simulator("tabletop")


@pytest.fixture(scope="module")
def policy(checkpoint_folder):
    return Policy.load(checkpoint_folder)


class Scripted:
    """Stands for a policy: chunk after chunk of small moves to the side that depend on the state, and remembers what
    it was told."""

    def __init__(self, policy):
        self.robot, self.config = policy.robot, policy.config
        self.told = []

    def infer_batch(self, observations, keys, num_steps=None):
        self.told += [(raw.get("delay"), raw.get("previous")) for raw in observations]
        return np.stack([np.full((6, 3), raw["state"][0] / 10, np.float32) for raw in observations])


@pytest.mark.parametrize(("milliseconds", "delay"), [(0, 0), (1, 1), (200, 1), (201, 2), (600, 3)])
def test_an_answer_is_as_many_steps_late_as_its_time_takes(policy, simulator, milliseconds, delay):
    (trace,) = simulate(Scripted(policy), simulator, receding_horizon(3, waits=False), Latency(milliseconds), 1)
    assert set(trace.delays) == {delay}
    assert (trace.chunks[:delay] == -1).all()
    assert (trace.chunks[delay:] >= 0).all()  # six actions, asked for after three: never starved
    assert len(trace.actions) == 40
    np.testing.assert_array_equal(trace.actions[:delay], 0)


def test_who_waits_stands_still_for_every_chunk(policy, simulator):
    (trace,) = simulate(Scripted(policy), simulator, receding_horizon(3), Latency(400), 1)
    np.testing.assert_array_equal(trace.chunks[:10] >= 0, [0, 0, 1, 1, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(trace.actions[trace.chunks < 0], 0)


def test_a_seed_gives_the_same_episodes_in_any_batches_and_other_latencies_for_each(policy, simulator):
    unsteady = Latency(300, jitter=250, drop=0.3, timeout=500)
    one, other = (simulate(Scripted(policy), simulator, real_time(2), unsteady, 5, 3, batch_size=n) for n in (2, 5))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.chunks, b.chunks)
        assert (a.task, a.delays, a.breaks) == (b.task, b.delays, b.breaks)
    assert [trace.task for trace in one] == list(simulator.tasks[:5])
    assert len({trace.delays for trace in one}) == 5
    assert {1, 2, 3} <= {delay for trace in one for delay in trace.delays}


def test_a_policy_whose_answers_are_all_lost_never_moves(policy, simulator):
    (trace,) = simulate(Scripted(policy), simulator, receding_horizon(3), Latency(drop=1.0), 1)
    assert not trace.actions.any()
    assert (trace.chunks == -1).all()
    assert not trace.delays


def test_real_time_chunking_counts_on_the_delays_that_were_measured(policy, simulator):
    scripted = Scripted(policy)
    simulate(scripted, simulator, real_time(3), Latency(400), 1)
    assert scripted.told[0] == (None, None)
    assert {delay for delay, _ in scripted.told[1:]} == {2}
    assert {len(previous) for _, previous in scripted.told[1:]} == {3}


def test_figures_are_those_of_the_traces():
    actions = np.array([[0.0], [1.0], [3.0], [3.5], [0.0], [2.0]])
    trace = Trace("a", True, actions, np.array([-1, 0, 0, 1, -1, 2]), (1, 1, 2), (0.5,))
    seam, inside = trace.changes()
    np.testing.assert_array_equal(seam, [0.5, 3.5, 2.0])
    np.testing.assert_array_equal(inside, [2.0])
    failed = Trace("b", False, np.zeros((40, 1)), np.full(40, -1), (), ())
    figures = summary([trace, failed], fps=2)
    assert (figures["rate"], figures["seconds"], figures["held"]) == (0.5, 3.0, 21.0)
    assert (figures["seam"], figures["inside"], figures["break"]) == (2.0, 2.0 / 40, 0.5)
    assert figures["delay"] == pytest.approx(4 / 3)


def test_times_lie_within_the_jitter_and_as_many_are_lost_as_said():
    rng = np.random.default_rng(0)
    drawn = [Latency(300, jitter=100, drop=0.2, timeout=900).draw(rng) for _ in range(2000)]
    times = np.array([time for time, answered in drawn if answered])
    assert 200 <= times.min() < 205
    assert 395 < times.max() <= 400
    assert {time for time, answered in drawn if not answered} == {900}
    assert len(times) == pytest.approx(1600, abs=60)


@pytest.mark.parametrize("bad", [{"typical": -1}, {"typical": 1, "jitter": 2}, {"drop": 1.1}, {"timeout": 0}])
def test_latencies_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="a latency of"):
        Latency(**bad)


def test_every_way_to_act_by_name_is_one_that_the_command_offers(checkpoint_folder, tmp_path, capsys):
    assert {"guidance", "identity", "trained"} <= set(STRATEGIES)
    args = Evaluate(checkpoint_folder, strategy="guidance", latency=300.0, jitter=100.0, episodes=2, output=tmp_path)
    evaluate(args)
    assert "guidance, 300 ± 100 ms: 0 of 2" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=r"fine-tune it with --policy\.objective\.max-delay"):
        evaluate(Evaluate(checkpoint_folder, strategy="trained"))
    with pytest.raises(ValueError, match="--latency, --jitter and --drop need a --strategy"):
        evaluate(Evaluate(checkpoint_folder, latency=100.0))


def test_another_robots_policy_is_refused(policy, simulator):
    with pytest.raises(ValueError, match=r"for the robot 'tabletop'; the environment has 'aloha'"):
        simulate(policy, dataclasses.replace(simulator, robot="aloha"), real_time(2), Latency(), 1)
    assert policy.config.real_time == RealTimeConfig()
