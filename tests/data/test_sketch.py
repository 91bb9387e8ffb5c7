"""Summaries: merged parts are the whole, and quantiles are within the stated bound."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from pi0_jax.data.robots import get_robot
from pi0_jax.data.sketch import SAMPLE, merge, scramble, summarise
from pi0_jax.data.tools import stats
from pi0_jax.data.tools.stats import compute_normalizations, finish, merge_summaries, summarise_source
from pi0_jax.errors import UserError
from tests.data.stats import compute_stats
from tests.data.test_loader import opened
from tests.data.test_normalization import in_memory


@pytest.fixture(scope="module")
def values():
    random = np.random.default_rng(0)
    return np.stack([random.normal(3, 2, 600_000), random.exponential(size=600_000)], 1).astype(np.float32)


@pytest.mark.parametrize("parts", [2, 7])
def test_merged_parts_are_the_whole_in_any_order(values, parts):
    identity = np.arange(len(values), dtype=np.uint64)
    whole = summarise(values, identity, 5000)
    sketches = [
        summarise(v, i, 5000)
        for v, i in zip(np.array_split(values, parts), np.array_split(identity, parts), strict=True)
    ]
    for order in (sketches, sketches[::-1]):
        merged = functools.reduce(functools.partial(merge, size=5000), order)
        for share in (0.01, 0.5, 0.99):
            np.testing.assert_array_equal(merged.quantile(share), whole.quantile(share))
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-12)
        np.testing.assert_array_equal([merged.min, merged.max], [whole.min, whole.max])
        assert merged.count == len(values)


def test_quantiles_are_within_the_stated_rank_and_exact_below_the_sample_size(values):
    assert len(values) > 2 * SAMPLE
    sketch = summarise(values, np.arange(len(values), dtype=np.uint64))
    for share in (0.01, 0.5, 0.99):
        rank = (values <= sketch.quantile(share)).mean(0)
        np.testing.assert_allclose(rank, share, atol=5 * np.sqrt(share * (1 - share) / SAMPLE))
    few = summarise(values[:1000], np.arange(1000, dtype=np.uint64))
    np.testing.assert_array_equal(few.quantile(0.01), np.quantile(values[:1000].astype(float), 0.01, axis=0))


def test_scrambled_numbers_are_different_and_even():
    numbers = scramble(np.arange(100_000, dtype=np.uint64))
    assert len(np.unique(numbers)) == 100_000
    counts = np.bincount((numbers >> np.uint64(60)).astype(int), minlength=16)
    assert np.abs(counts - 6250).max() < 5 * np.sqrt(6250)


def dataset_in_memory(lengths=(30, 50, 20)):
    random, total = np.random.default_rng(1), sum(lengths)
    state, action = (random.normal(size=(total, 7)).astype(np.float32) for _ in range(2))
    return in_memory(state, action, (random.random((total, 1)) < 0.9).astype(np.float32), lengths)


def test_relative_actions_are_summarised_over_whole_chunks_as_training_sees_them():
    source, robot, horizon = dataset_in_memory(), get_robot("ur5"), 4
    semantics = (*["relative"] * 6, "gripper")
    entry = compute_stats(source, robot, semantics, horizon)["actions"]
    state, actions, valid = (source.numbers[name] for name in ("observation.state", "action", "valid"))
    seen = []
    for episode in range(3):
        first, end = source.episode_range(episode)
        for i in range(first, end):
            for step in range(i, min(i + horizon, end)):
                if not valid[step, 0]:
                    break
                seen.append(actions[step] - state[i])
    seen = np.array(seen, float)
    np.testing.assert_allclose(entry.mean[:6], seen.mean(0)[:6], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(entry.q01[:6], np.quantile(seen, 0.01, axis=0)[:6], rtol=1e-5)
    np.testing.assert_allclose(entry.std[6], actions[valid[:, 0] > 0, 6].astype(float).std(), rtol=1e-9)


def test_episodes_can_be_summarised_apart_and_merged(monkeypatch):
    source, robot, semantics = dataset_in_memory(), get_robot("ur5"), (*["relative"] * 6, "gripper")
    whole = compute_stats(source, robot, semantics, 4)
    parts = [summarise_source(source, robot, semantics, 4, [episode]) for episode in (2, 0, 1)]
    monkeypatch.setattr("pi0_jax.data.tools.stats.ROWS_AT_ONCE", 40)
    for merged in (finish(merge_summaries(parts)), compute_stats(source, robot, semantics, 4)):
        for key in ("state", "actions"):
            np.testing.assert_array_equal(merged[key].q99, whole[key].q99)
            np.testing.assert_allclose(merged[key].std, whole[key].std, rtol=1e-12)


def test_several_processes_give_the_same_statistics(dataset, monkeypatch):
    monkeypatch.setattr("pi0_jax.data.tools.stats.FRAMES_PER_TASK", 10)
    one, two = (compute_normalizations([opened(dataset)], 4, workers=n)["tabletop"].stats for n in (1, 2))
    whole = compute_stats(dataset)
    for key in ("state", "actions"):
        for a, b in zip(one[key], two[key], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one[key].q99, whole[key].q99)


def test_a_group_whose_dimensions_differ_in_number_or_meaning_is_refused(dataset):
    one = opened(dataset)
    for other in (
        one._replace(robot=dataclasses.replace(one.robot, state=("a", "b"))),
        one._replace(semantics=("absolute", "absolute", "gripper")),
    ):
        with pytest.raises(UserError, match="Give them different names in `stats`"):
            compute_normalizations([one, other], 4)


def test_before_training_large_datasets_are_sampled_and_the_log_says_so(dataset, monkeypatch, caplog):
    caplog.set_level("INFO")
    whole = opened(dataset)
    assert not caplog.text
    monkeypatch.setattr("pi0_jax.data.tools.stats.FEW_FRAMES", 33)
    monkeypatch.setattr("pi0_jax.data.tools.stats.SAMPLED", 20)
    found, again = (compute_normalizations([whole], 4, sampled=True)["tabletop"].stats for _ in range(2))
    assert "statistics are of 3 of 5 episodes, taken at random" in caplog.text
    monkeypatch.setattr("pi0_jax.data.tools.stats.SAMPLED_EPISODES", 2)
    compute_normalizations([whole], 4, sampled=True)
    assert "statistics are of 2 of 5 episodes, taken at random" in caplog.text
    np.testing.assert_array_equal(found["state"].q99, again["state"].q99)
    states = [dataset.read("observation.state", np.array(three)) for three in itertools.combinations(range(5), 3)]
    assert sum(np.array_equal(found["state"].max, each.max(0)) for each in states) >= 1
    caplog.clear()
    np.testing.assert_array_equal(compute_normalizations([whole], 4)["tabletop"].stats["state"].max, whole_max(dataset))
    assert "at random" not in caplog.text


def whole_max(dataset):
    return dataset.columns("observation.state").max(0)


def test_a_computation_that_was_stopped_goes_on(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(stats, "FRAMES_PER_TASK", 10)
    whole, kept, one = (
        compute_normalizations([opened(dataset)], 4)["tabletop"].stats,
        tmp_path / "kept",
        stats._summarise,
    )
    calls = []

    def stop(*task):
        calls.append(task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return one(*task)

    monkeypatch.setattr(stats, "_summarise", stop)
    with pytest.raises(KeyboardInterrupt):
        compute_normalizations([opened(dataset)], 4, kept=kept)
    assert kept.is_file()
    again = compute_normalizations([opened(dataset)], 4, kept=kept)["tabletop"].stats
    assert len(calls) == 1 + 4  # the third task twice
    assert not kept.exists()
    for key in ("state", "actions"):
        np.testing.assert_array_equal(again[key].q99, whole[key].q99)
        np.testing.assert_allclose(again[key].mean, whole[key].mean, rtol=1e-12)
    calls[:] = calls[:2]
    with pytest.raises(KeyboardInterrupt):
        compute_normalizations([opened(dataset)], 4, kept=kept)
    compute_normalizations([opened(dataset)], 5, kept=kept)  # another one begins anew
    assert len(calls) > 1 + 4
