"""What `pi0 data check` has to see: another order, changes that are to become relative, statistics of another robot."""

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
            action = np.diff(state, axis=0, append=state[-1:]) if changes else state + rng.normal(0, 0.2, state.shape)
            pictures = {name: np.zeros((60, 16, 16, 3), np.uint8) for name in cameras}
            writer.add_episode(pictures | {"observation.state": state, "action": action.astype(np.float32)}, "go")
    return root


def problems(root, scale=None) -> str:
    policy = PolicyConfig(robot="so101", model=ModelConfig(action_horizon=4))
    (dataset,) = open_datasets(DataConfig(str(root)), policy)
    stats = compute_normalizations([dataset], 4)["so101"].stats
    given = None
    if scale is not None:
        given = {key: entry._replace(mean=entry.mean + scale * entry.std) for key, entry in stats.items()}
    return "\n".join(check_dataset(dataset, stats, given).problems)


def test_a_good_dataset_has_none(tmp_path):
    assert problems(record(tmp_path / "data"), scale=1.0) == ""


def test_another_order_is_seen_by_the_names(tmp_path):
    swapped = (NAMES[1], NAMES[0], *NAMES[2:])
    found = problems(record(tmp_path / "data", swapped))
    assert "stand in another order" in found
    assert NAMES[0] in found


def test_changes_that_are_to_become_relative_are_seen_in_the_data(tmp_path):
    assert "seem to be changes already" in problems(record(tmp_path / "data", changes=True))


def test_statistics_of_another_robot_are_seen(tmp_path):
    found = problems(record(tmp_path / "data"), scale=50.0)
    assert "50 standard deviations off data.norm_stats" in found


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
