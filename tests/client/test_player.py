"""Chunks with numbered actions: action n of a chunk queried at step k is k + n, plus the chunk's number / 100."""

import numpy as np
import pytest

from pi0_client.player import (
    Chunk,
    Delays,
    Player,
    Strategy,
    ensemble,
    open_loop,
    real_time,
    receding_horizon,
    temporal_ensemble,
)
from pi0_jax.data.robots import ROBOTS, get_robot


def play(player, delays, steps, horizon=8, log=None):
    """Executed actions when answers take `delays` steps; inf: no answer, and the query is abandoned after 4 steps."""
    delays, done, asked, due = iter(delays), [], None, None

    def arrive(step):
        if due == step:
            player.receive(asked.step + np.arange(horizon)[:, None] + player.num_chunks / 100)
        elif due is not None and np.isinf(due) and step == asked.step + 4:
            player.abandon()

    for step in range(steps):
        arrive(step)
        query = player.query()
        if query is not None:
            asked, due = query, step + next(delays)
            arrive(step)
            if log is not None:
                log.append(query)
        action = player.play().action
        done.append(None if action is None else round(float(action[0]), 3))
    return done


def test_open_loop_without_delay_executes_every_chunk_to_its_end():
    assert play(Player(open_loop(3)), [0] * 9, 7, horizon=3) == [0, 1, 2, 3.01, 4.01, 5.01, 6.02]


def test_with_waits_the_robot_holds_and_then_starts_at_the_first_action():
    done = play(Player(receding_horizon(2)), [2] * 9, 9)
    assert done == [None, None, 0, 1, 1, 1, 4.01, 5.01, 5.01]


def test_without_waits_it_continues_and_switches_at_the_current_step():
    done = play(Player(receding_horizon(3, waits=False)), [1] * 9, 10)
    # The first chunk finds a robot that stood still and is executed from its first action; later ones lose one.
    assert done == [None, 0, 1, 2, 3, 5.01, 6.01, 7.01, 8.02, 9.02]


def test_after_starving_the_next_chunk_skips_executed_steps_only():
    done = play(Player(receding_horizon(2, waits=False)), [0, 5, 9], 9, horizon=4)
    assert done == [0, 1, 2, 3, 3, 3, 3, 4.01, 5.01]  # queried at step 2; 2 and 3 were executed meanwhile


def test_abandoned_queries_are_sent_again():
    log = []
    play(Player(real_time(2)), [0, np.inf, 1, 1], 9, log=log)
    assert [ask.step for ask in log] == [0, 2, 6, 8]
    assert play(Player(receding_horizon(2)), [np.inf] * 3, 6) == [None] * 6


def test_real_time_queries_have_remaining_actions_and_the_longest_delay():
    log = []
    player = Player(real_time(3), delays=Delays(memory=2, initial=1))
    play(player, [2, 1, 3, 1, 0, 0, 0], 20, log=log)
    assert log[0].previous is None
    assert log[0].as_request() == {}
    for ask, delay in zip(log[1:], (2, 2, 3, 3, 1, 0), strict=False):
        assert ask.delay == ask.as_request()["delay"] == min(delay, len(ask.previous))
        # The first one left is for the step of the question.
        first = ask is log[1]  # that chunk was asked for at 0, but starts at 2
        assert int(ask.previous[0, 0]) == ask.step - 2 * first
    assert player.delays.expected() == 0


def test_delays_expect_a_quantile_rounded_up():
    delays = Delays(memory=4, quantile=0.5, initial=3)
    assert delays.expected() == 3
    for steps in (9, 1, 2, 2, 5):
        delays.add(steps)
    assert delays.expected() == 2
    delays.add(9)
    assert delays.expected() == 4  # of 2, 2, 5, 9


def test_an_ensemble_averages_covering_chunks_the_oldest_weighing_most():
    chunks = [Chunk(0, np.array([[1.0], [2.0]])), Chunk(1, np.array([[4.0], [6.0]])), Chunk(2, np.array([[9.0]]))]
    w = np.exp(-0.5)
    np.testing.assert_allclose(ensemble(chunks, 1, 0.5), (2 + w * 4) / (1 + w))
    np.testing.assert_allclose(ensemble(chunks, 2, 0.5), (6 + w * 9) / (1 + w))
    np.testing.assert_allclose(ensemble(chunks, 1, 0.0), 3)
    done = play(Player(temporal_ensemble(0.0)), [0] * 9, 4)
    np.testing.assert_allclose(done, [0, 1 + 0.005, 2 + 0.01, 3 + 0.015])


def test_a_strategy_that_never_executes_is_refused():
    with pytest.raises(ValueError, match="execute_steps is 0"):
        Strategy(0)
    with pytest.raises(ValueError, match=r"decay -1\.0"):
        temporal_ensemble(-1.0)


def test_holding_still_repeats_positions_and_stops_changes():
    libero = get_robot("libero")
    np.testing.assert_array_equal(libero.still(np.arange(1, 8)), [0, 0, 0, 0, 0, 0, 7])
    player = Player(receding_horizon(1), get_robot("tabletop").still)
    player.query()
    player.receive(np.ones((1, 3)))
    player.play()
    player.query()
    np.testing.assert_array_equal(player.play().action, [0, 0, 0])


@pytest.mark.parametrize("name", ROBOTS)
def test_robots_name_all_their_changes(name):
    robot = get_robot(name)
    named = tuple(a for a in robot.actions if a.startswith("d") and a[1:] in ("x", "y", "z", "roll", "pitch", "yaw"))
    extra = {"droid_velocity": robot.actions[:7], "fractal": ("gripper_closing",)}.get(name, ())
    assert robot.changes == named + extra
