"""What `pi0 data check` has to see in a dataset, and what it must not complain about."""

import numpy as np
import pytest

from pi0_jax.config import DataConfig, ModelConfig, PolicyConfig
from pi0_jax.data.lerobot import LeRobotWriter
from pi0_jax.data.mixture import open_datasets
from pi0_jax.data.robots import get_robot
from pi0_jax.data.tools.check import check_dataset
from pi0_jax.data.tools.stats import compute_normalizations

NAMES = get_robot("so101").state


def record(root, names=NAMES, changes=False):
    vector = {"dtype": "float32", "shape": (6,), "names": list(names)}
    cameras = {f"observation.images.{name}": {"dtype": "video", "shape": (16, 16, 3)} for name in ("front", "wrist")}
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, 30, "so101", cameras | {"observation.state": vector, "action": vector}) as writer:
        for _ in range(4):
            state = np.cumsum(rng.normal(size=(60, 6)), axis=0).astype(np.float32)
            state[:, 5] = 50 + 50 * np.cos(np.arange(60) / 10)  # the gripper
            action = np.diff(state, axis=0, append=state[-1:]) if changes else state + rng.normal(0, 0.2, state.shape)
            pictures = {name: np.zeros((60, 16, 16, 3), np.uint8) for name in cameras}
            writer.add_episode(pictures | {"observation.state": state, "action": action.astype(np.float32)}, "go")
    return root


def opened(root, robot="so101"):
    (dataset,) = open_datasets(DataConfig(str(root)), PolicyConfig(robot=robot, model=ModelConfig(action_horizon=4)))
    return dataset


def problems(root) -> str:
    dataset = opened(root)
    return "\n".join(check_dataset(dataset, compute_normalizations([dataset], 4)["so101"].stats).problems)


def test_a_good_dataset_has_none(tmp_path):
    assert problems(record(tmp_path / "data")) == ""


def test_changes_that_are_to_become_relative_are_seen_in_the_data(tmp_path):
    assert "seem to be changes already" in problems(record(tmp_path / "data", changes=True))


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
def test_a_rare_gripper_stays_within_bounds(tmp_path, mode):
    from pi0_jax.data.normalization import LARGEST, NormStats, bounded, normalize_values

    values = np.zeros((10_000, 2))
    values[:, 0] = np.random.default_rng(0).normal(size=10_000)
    values[:50, 1] = 1.0  # 0.5 % of the frames
    raw = NormStats(
        values.mean(0), values.std(0), *np.quantile(values, [0.01, 0.99], axis=0), values.min(0), values.max(0)
    )
    stats, changed = bounded(raw)
    assert changed == [1]
    assert np.abs(normalize_values(values, stats, mode)).max() <= LARGEST + 1e-3
    gripper = normalize_values(values, stats, mode)[:, 1]
    assert len(np.unique(gripper)) == 2
    if mode == "quantile":
        np.testing.assert_allclose(np.unique(gripper), [-1, 1], atol=1e-4)
