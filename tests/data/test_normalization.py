"""Normalisation: openpi's formulas bit for bit, bounded where dimensions hardly vary, and its file format."""

import json
from pathlib import Path

import numpy as np
import pytest

from pi0_jax.data.normalization import (
    NormStats,
    affine,
    check_stats,
    normalize_values,
    read_stats_file,
    save_json,
    stats_from_json,
    stats_to_json,
    unnormalize_values,
)
from pi0_jax.data.source import Source
from tests.data.stats import compute_stats

MODES = ("zscore", "quantile")


class InMemory(Source):
    """Columns of numbers in episodes of given lengths, without pictures."""

    def __init__(self, lengths, **columns):
        self.root, self.numbers = Path("memory"), columns
        self.features = {name: {"dtype": "float32", "shape": v.shape[1:], "names": None} for name, v in columns.items()}
        self.ends, self.episodes = np.cumsum(lengths), [f"episode {i}" for i in range(len(lengths))]

    def read(self, name, episodes):
        return self.numbers[name][self.frames_of(episodes)]

    @property
    def task_index(self):
        return np.zeros(self.num_frames, int)

    def images(self, camera, rows):
        raise AssertionError("statistics need no picture")

    def picture_files(self, camera):
        return []


def in_memory(state, action, valid=None, lengths=None):
    columns = {"observation.state": state, "action": action} | ({} if valid is None else {"valid": valid})
    return InMemory(lengths or [len(state)], **columns)


def stats_of(values):
    return compute_stats(in_memory(values, values))["state"]


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(2, [0.01, 1, 30], (1000, 3)).astype(np.float32)


def test_stats_are_numpys_and_leave_invalid_actions_out(values):
    valid = (np.arange(1000) % 3 > 0).astype(np.float32)[:, None]
    spoilt = np.where(valid > 0, values, 1e6).astype(np.float32)
    stats = compute_stats(in_memory(values, spoilt, valid))
    kept = values[valid[:, 0] > 0].astype(float)
    np.testing.assert_array_equal(stats["actions"].mean, kept.mean(0))
    np.testing.assert_array_equal(stats["actions"].q99, np.quantile(kept, 0.99, axis=0))
    np.testing.assert_array_equal(stats["state"].std, values.astype(float).std(0))


def test_stats_never_open_a_video(dataset, monkeypatch):
    monkeypatch.setattr(type(dataset), "images", lambda *_: pytest.fail("opened a video"))
    assert len(compute_stats(dataset)["actions"].mean) == 3


def test_ordinary_dimensions_follow_openpi_bit_for_bit(values):
    stats = stats_of(values)
    zscore = (values - stats.mean) / (stats.std + 1e-6)
    quantile = (values - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2.0 - 1.0
    np.testing.assert_array_equal(normalize_values(values, stats, "zscore"), zscore)
    np.testing.assert_array_equal(normalize_values(values, stats, "quantile"), quantile)
    np.testing.assert_array_equal(unnormalize_values(zscore, stats, "zscore"), zscore * (stats.std + 1e-6) + stats.mean)
    np.testing.assert_array_equal(
        unnormalize_values(quantile, stats, "quantile"),
        (quantile + 1.0) / 2.0 * (stats.q99 - stats.q01 + 1e-6) + stats.q01,
    )


@pytest.mark.parametrize("mode", MODES)
def test_unnormalizing_undoes_normalizing(values, mode):
    stats = stats_of(values)
    np.testing.assert_allclose(
        unnormalize_values(normalize_values(values, stats, mode), stats, mode), values, rtol=1e-12
    )


@pytest.mark.parametrize("mode", MODES)
def test_affine_is_the_same_map(values, mode):
    stats = stats_of(values)
    scale, offset = affine(stats, mode)
    y = normalize_values(values, stats, mode)
    np.testing.assert_allclose(scale * y + offset, values, rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_rare_events_stay_bounded(mode):
    values = np.zeros((100_000, 1))
    values[7] = 1.0
    stats = stats_of(values)
    assert np.abs(normalize_values(values, stats, mode)).max() <= 201
    np.testing.assert_allclose(unnormalize_values(normalize_values(values, stats, mode), stats, mode), values)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("jitter", [0.0, 1e-8])
def test_constant_dimension_ignores_what_comes_and_returns_the_constant(mode, jitter):
    values = 0.3 + jitter * np.random.default_rng(0).normal(size=(100, 1))
    stats = stats_of(values)
    at_constant = normalize_values(values, stats, mode)
    np.testing.assert_array_equal(normalize_values(values + 5.0, stats, mode), at_constant)
    np.testing.assert_allclose(unnormalize_values(np.array([[17.0]]), stats, mode), 0.3, atol=1e-6)


def test_without_range_the_formula_is_openpis_even_for_constants():
    stats = NormStats(*(np.array([x]) for x in (0.3, 0.0, 0.3, 0.3)))
    np.testing.assert_array_equal(normalize_values(np.array([0.3 + 1e-6]), stats, "zscore"), (0.3 + 1e-6 - 0.3) / 1e-6)


def test_reads_openpis_file_and_writes_what_openpi_reads(fixtures, tmp_path):
    path = fixtures / "openpi_pi0_tiny" / "assets" / "tiny_robot" / "norm_stats.json"
    stats = stats_from_json(read_stats_file(path))
    assert stats_to_json(stats) == json.loads(path.read_text())
    save_json(stats_to_json(stats), tmp_path / "norm_stats.json")
    assert (tmp_path / "norm_stats.json").read_text() == path.read_text()
    assert sorted(stats) == ["actions", "state"]


def test_own_stats_survive_the_file_exactly(values, tmp_path):
    stats = compute_stats(in_memory(values, values))
    save_json(stats_to_json(stats), tmp_path / "norm_stats.json")
    for key, entry in stats_from_json(read_stats_file(tmp_path / "norm_stats.json")).items():
        for field, value in entry._asdict().items():
            np.testing.assert_array_equal(value, getattr(stats[key], field))


def entry(**changes):
    return {"mean": [0.0, 1.0], "std": [1.0, 1.0], "q01": None, "q99": None} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": entry()}, "expected one called 'norm_stats'"),
        ({"norm_stats": {"state": {"mean": [0.0]}}}, r"'state' lack \['std'\]"),
        (
            {"norm_stats": {"state": entry(std=[1.0, float("nan")])}},
            r"std of 'state' is not finite in dimensions \[1\]",
        ),
        ({"norm_stats": {"state": entry(std=[1.0])}}, "of equal length"),
    ],
)
def test_broken_stats_are_refused_and_say_why(content, message):
    with pytest.raises(ValueError, match=message):
        stats_from_json(content)


def test_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected normalisation statistics"):
        stats_from_json(read_stats_file(tmp_path / "norm_stats.json"))
    (tmp_path / "norm_stats.json").write_bytes(b"\x00\xff")
    with pytest.raises(ValueError, match="is not JSON"):
        stats_from_json(read_stats_file(tmp_path / "norm_stats.json"))


def test_stats_of_another_robot_are_refused_by_the_names_of_the_dimensions(values):
    stats = compute_stats(in_memory(values, values))
    with pytest.raises(ValueError, match=r"'actions' have 3 dimensions; the robot has 2: left, right"):
        check_stats(stats, {"state": ("x", "y", "z"), "actions": ("left", "right")})
    with pytest.raises(ValueError, match="lack 'actions'"):
        check_stats({"state": stats["state"]}, {"actions": ("left",)})


def test_quantiles_are_needed_only_where_used():
    stats = stats_from_json({"norm_stats": {"state": entry()}})["state"]
    normalize_values(np.zeros(2), stats, "zscore")
    with pytest.raises(ValueError, match="Use 'zscore'"):
        normalize_values(np.zeros(2), stats, "quantile")


def test_values_that_are_not_finite_and_actions_that_are_all_invalid_are_reported(values):
    spoilt = values.copy()
    spoilt[5, 1] = np.inf
    with pytest.raises(ValueError, match=r"'observation.state' holds NaN or infinity in 1 frames"):
        compute_stats(in_memory(spoilt, values))
    with pytest.raises(ValueError, match="no action is left to learn"):
        compute_stats(in_memory(values, values, np.zeros((1000, 1))))


@pytest.mark.parametrize("mean", ["x", ["a"], {"a": 1}])
def test_statistics_that_are_no_numbers_are_named(mean):
    with pytest.raises(ValueError, match="of 'state' are not lists of numbers"):
        stats_from_json({"norm_stats": {"state": {"mean": mean, "std": [1.0]}}})
