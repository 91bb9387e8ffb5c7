"""Values of a few frames of a large dataset are read alone, until its columns are there."""

import concurrent.futures
import pickle

import numpy as np
import pytest

from pi0_jax.data import pool, source
from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.source import Renamed, Reordered
from pi0_jax.errors import UserError
from tests.data.conftest import write

ROWS = np.array([[30, 0, 13], [14, 33, 13]])


@pytest.fixture
def large(monkeypatch):
    """Makes every dataset a large one, whose columns never come."""
    monkeypatch.setattr(source, "FEW_FRAMES", 0)
    monkeypatch.setattr(source, "behind", lambda function: concurrent.futures.Future())


def test_values_are_those_of_the_columns(dataset, large):
    order = [2, 0, 1]
    wrapped = Reordered(Renamed(dataset, {"moves": "action"}), {"moves": order})
    np.testing.assert_array_equal(wrapped.values("moves", ROWS), dataset.columns("action")[ROWS][..., order])
    fresh = LeRobotDataset(dataset.root)
    np.testing.assert_array_equal(fresh.values("observation.state", ROWS), dataset.columns("observation.state")[ROWS])
    np.testing.assert_array_equal(Renamed(fresh, {}).task_numbers(ROWS), dataset.task_index[ROWS])
    assert all(not isinstance(kept, np.ndarray) for kept in vars(fresh)["_columns"].values())  # no column was read


def test_chunks_of_a_large_dataset_end_with_their_episodes(dataset, large):
    found, expected = (each.chunk(ROWS, 6) for each in (LeRobotDataset(dataset.root), dataset))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_columns_that_are_read_behind_are_used_and_not_pickled(dataset, monkeypatch):
    monkeypatch.setattr(source, "FEW_FRAMES", 0)
    monkeypatch.setattr(pool, "BEHIND_AFTER", 0.0)
    fresh = LeRobotDataset(dataset.root)
    fresh.values("action", ROWS)
    vars(fresh)["_columns"]["behind", "action"].result(timeout=60)
    with monkeypatch.context() as without_files:
        without_files.setattr(LeRobotDataset, "read", None)
        np.testing.assert_array_equal(fresh.values("action", ROWS), dataset.columns("action")[ROWS])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fresh)).columns("action"), dataset.columns("action"))


def test_a_file_that_cannot_be_read_is_an_error_of_whoever_asks_next(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "FEW_FRAMES", 0)
    monkeypatch.setattr(pool, "BEHIND_AFTER", 0.0)
    damaged = LeRobotDataset(write(tmp_path / "data"))
    next((damaged.root / "data").glob("*/*.parquet")).write_bytes(b"PAR1")
    future = pool.behind(lambda: damaged.columns("action"))
    with pytest.raises(UserError, match="Copy the dataset again"):
        future.result(timeout=60)


@pytest.mark.parametrize("episodes", [[], [3], [0, 2, 4]])
def test_frames_of_episodes(dataset, episodes):
    expected = [row for episode in episodes for row in range(*dataset.episode_range(episode))]
    assert dataset.frames_of(np.array(episodes, int)).tolist() == expected
