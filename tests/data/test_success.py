"""Successful episodes alone, and frames of interventions alone, of rollouts."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.lerobot import LeRobotWriter
from pi0_jax.data.loader import learnable_frames
from pi0_jax.data.mixture import open_datasets
from pi0_jax.data.source import SUCCESS
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.errors import UserError
from tests.data.conftest import FEATURES, LENGTHS, TASKS, episode

MARKS = {
    SUCCESS: {"dtype": "bool", "shape": (1,), "names": None},
    "human": {"dtype": "float32", "shape": (1,), "names": None},
}
VECTORS = {name: FEATURES[name] for name in ("observation.state", "action")}
WON = [True, False, True, False, False]


def write(root, won=WON, marks=MARKS):
    """Rollouts without pictures; a person acted in the first two frames of each."""
    features = VECTORS | marks
    with LeRobotWriter(root, fps=5, robot_type="tabletop", features=features) as writer:
        for number, success in enumerate(won):
            length = LENGTHS[number]
            frames = episode(number)
            frames[SUCCESS] = np.arange(length)[:, None] == (length - 1 if success else -1)
            frames["human"] = (np.arange(length)[:, None] < 2).astype(np.float32)
            writer.add_episode({name: frames[name] for name in features}, TASKS[number])
    return str(root)


def opened(config, *datasets, **data):
    return open_datasets(DataConfig(datasets=datasets, success_only=True, **data), config.policy)


def test_failures_are_left_out_of_training_statistics_and_validation(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rollouts, demonstrations = write(tmp_path / "rollouts"), write(tmp_path / "human", marks={})
    first, second = opened(config, DatasetConfig(rollouts), DatasetConfig(demonstrations, stats="other"))
    assert f"{rollouts}: kept 2 of 5 episodes" in caplog.text
    np.testing.assert_array_equal(first.training, [0, 2])
    np.testing.assert_array_equal(second.training, np.arange(5))
    assert set(first.source.episode_of(learnable_frames(first.source, first.training))) == {0, 2}
    states = np.concatenate([episode(number)["observation.state"] for number in (0, 2)])
    stats = compute_normalizations([first], 4)["tabletop"].stats["state"]
    np.testing.assert_allclose(stats.mean, states.mean(0), rtol=1e-5)
    (split,) = opened(config, DatasetConfig(rollouts), validation_share=0.5)
    assert sorted([*split.training, *split.held_out]) == [0, 2]


def test_another_column_may_say_what_succeeded_and_what_is_learnt(config, tmp_path):
    rollouts = write(tmp_path / "rollouts")
    (found,) = opened(config, DatasetConfig(rollouts, keys={SUCCESS: "human"}))
    assert len(found.training) == 5
    (found,) = opened(config, DatasetConfig(rollouts, keys={"valid": "human"}))
    np.testing.assert_array_equal(learnable_frames(found.source, found.training), [0, 1, 14, 15])


def test_what_cannot_be_selected_is_said(config, tmp_path):
    demonstrations, lost = write(tmp_path / "human", marks={}), write(tmp_path / "lost", [False, False])
    with pytest.raises(UserError, match=r"human has no column 'next\.success'.*keys=\{'next\.success': 'NAME'\}"):
        opened(config, DatasetConfig(demonstrations))
    with pytest.raises(UserError, match="0 throughout, so no episode is left"):
        opened(config, DatasetConfig(lost))
    data = dataclasses.replace(config.data, path=lost)
    assert len(open_datasets(data, config.policy)[0].training) == 2
