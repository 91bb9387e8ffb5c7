"""Figures of chunks whose errors, delays and neighbours are known."""

import numpy as np
import pytest

from pi0_jax.diagnose import measure
from pi0_jax.diagnose.measure import Stream

RNG = np.random.default_rng(0)


def test_errors_count_valid_steps_alone():
    errors, valid = np.ones((4, 3, 2)), np.ones((4, 3), bool)
    errors[:, 2], valid[:, 2] = 100, False
    assert measure.root_mean_square(errors, valid) == 1
    np.testing.assert_allclose(measure.per_chunk(errors, valid), 1)
    assert measure.horizon(errors, valid) == [1, 1]
    assert measure.root_mean_square(errors, np.zeros_like(valid)) == 0
    np.testing.assert_array_equal(measure.per_chunk(errors, np.zeros_like(valid)), 0)


def test_phases_are_thirds_of_each_episode():
    errors = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])[:, None, None] * np.ones((6, 2, 2))
    step, length = np.array([0, 4, 8, 0, 40, 89]), np.array([10] * 3 + [90] * 3)
    assert measure.phases(errors, np.ones((6, 2), bool), step, length) == [1, 2, 3]
    assert measure.phases(errors[:1], np.ones((1, 2), bool), step[:1], length[:1]) == [1, None, None]


def test_an_interval_covers_the_truth_and_is_of_pairs():
    episode = np.repeat(np.arange(30), 5)
    expert, valid = np.zeros((150, 4, 2)), np.ones((150, 4), bool)
    plain = (
        RNG.normal(size=expert.shape) * np.exp(RNG.normal(size=30))[episode][:, None, None]
    )  # hard and easy episodes
    found = measure.use("camera", "top", "black", plain, 1.5 * plain, expert, valid, episode)
    assert found.increase.value == pytest.approx(0.5)
    assert (found.increase.low, found.increase.high) == pytest.approx(
        (0.5, 0.5)
    )  # pairs: hard episodes are hard in both
    assert found.change == pytest.approx(0.5)
    noisy = plain + RNG.normal(size=expert.shape)
    other = measure.use("camera", "top", "black", plain, noisy, expert, valid, episode).increase
    assert other.low < other.value < other.high


def test_an_exact_policy_divides_by_nothing():
    zeros, valid = np.zeros((6, 2, 1)), np.ones((6, 2), bool)
    found = measure.use("state", "state", "other", zeros, zeros, zeros, valid, np.repeat([0, 1], 3))
    assert found.increase.value == 0
    assert np.isfinite([found.increase.low, found.increase.high, found.change]).all()


def test_skill_is_one_for_exact_and_zero_for_average_actions():
    expert, valid = RNG.normal(size=(50, 4, 3)), np.ones((50, 4), bool)
    expert[..., 2] = 7
    predicted = expert.copy()
    predicted[..., 1] = expert[..., 1].mean()
    raw = dict(zip("ab", measure.per_dimension(2 * (predicted - expert)[..., :2], valid), strict=True))
    exact, average, constant = measure.dimensions(("a", "b", "c"), predicted, expert, raw, valid)
    assert exact.skill == 1
    assert average.skill == pytest.approx(0)
    assert constant.skill is None
    assert constant.error is None  # not the robot's
    assert average.error == pytest.approx(2 * expert[..., 1].std())


def test_jitter_and_seams_are_ratios_to_the_demonstrations():
    time = np.arange(64)[:, None]
    moves = np.sin(time / 5 + np.array([0, 1]))
    expert = np.stack([moves[i : i + 8] for i in range(0, 48, 4)])
    valid, episode = np.ones(expert.shape[:2], bool), np.zeros(len(expert), int)
    alike = measure.roughness(expert, expert, valid, episode, 4, [0, 1])
    assert (alike.jitter, alike.seams) == pytest.approx((1, 1))
    shaking = expert + 0.1 * np.where(np.arange(8) % 2, 1, -1)[None, :, None]
    assert measure.roughness(shaking, expert, valid, episode, 4, [0, 1]).jitter > 5
    jumping = expert + np.where(np.arange(len(expert)) % 2, 1.0, -1.0)[:, None, None]
    jumps = measure.roughness(jumping, expert, valid, episode, 4, [0, 1])
    assert jumps.jitter == pytest.approx(1)
    assert jumps.seams > 5
    alone = measure.roughness(expert, expert, valid, np.arange(len(expert)), 4, [0, 1])
    assert alone.seams is None  # no two chunks of an episode


def test_streams_take_of_each_chunk_what_is_executed():
    chunks = np.arange(5)[:, None, None] * 10.0 + np.arange(4)[None, :, None]
    first, second = measure.streams(chunks, -chunks, np.array([0, 0, 0, 1, 1]), np.array([7, 5]), 3)
    assert first.predicted.ravel().tolist() == [0, 1, 2, 10, 11, 12, 20]
    assert second.expert.ravel().tolist() == [-30, -31, -32, -40, -41]


@pytest.mark.parametrize("delay", [-3, 0, 6])
@pytest.mark.parametrize("closed", [1.0, 0.0])
def test_switches_are_found_with_their_delay_whatever_the_polarity(delay, closed):
    found = []
    for start in range(20, 32):
        demonstrated = np.full((80, 1), 1 - closed)
        demonstrated[start:60] = closed
        predicted = np.roll(demonstrated, delay, axis=0) + RNG.normal(0, 0.02, (80, 1))
        found.append(Stream(predicted, demonstrated))
    closes, opens = measure.switches("gripper", 0, found, 15)
    assert (closes.motion, opens.motion) == ("closes", "opens")
    assert (closes.count, closes.found, closes.own, opens.found) == (12, 12, 12, 12)
    assert closes.delay.value == opens.delay.value == delay
    assert closes.delay.low == closes.delay.high == delay


def test_a_gripper_that_never_moves_has_no_switches_and_one_that_is_not_followed_no_delay():
    still, moves = np.zeros((20, 1)), np.where(np.arange(20) > 8, 1.0, 0.0)[:, None]
    assert measure.switches("gripper", 0, [Stream(moves, still)], 5) == []
    (found,) = measure.switches("gripper", 0, [Stream(still, moves)], 5)
    assert (found.count, found.found, found.own, found.delay) == (1, 0, 0, None)


def test_nearest_frames_are_found_and_those_of_the_same_episode_left_out():
    training = RNG.normal(size=(40, 6)).astype(np.float32)
    near = measure.nearest(training[[3, 17]] + 1e-4, training, 2)
    assert near.number[:, 0].tolist() == [3, 17]
    assert (near.distance[:, 0] < near.distance[:, 1]).all()
    group = np.repeat(np.arange(20), 2)
    others = measure.nearest(training[:10], training, 1, group)
    assert (group[others.number[:, 0]] != group[:10]).all()


def test_rank_correlation_is_of_ranks():
    a = RNG.random(50)
    assert measure.rank_correlation(a, np.exp(5 * a)) == pytest.approx(1)
    assert measure.rank_correlation(a, -a) == pytest.approx(-1)
    assert measure.rank_correlation(a, np.ones(50)) == 0
