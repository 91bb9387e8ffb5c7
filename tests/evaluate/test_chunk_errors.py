"""Chunks are compared with the demonstrations that training held out, wherever those are."""

import numpy as np
import pytest

from pi0_jax.config import DataConfig, DatasetConfig, PolicyConfig, TrainConfig
from pi0_jax.data.lerobot.reader import LeRobotDataset
from pi0_jax.data.mixture import open_datasets
from pi0_jax.data.robots import get_robot
from pi0_jax.evaluate.chunk_errors import held_out
from tests.conftest import tiny_config
from tests.data.conftest import LENGTHS, write
from tests.data.formats import RLDS_KEYS, write_rlds

ROBOT = get_robot("tabletop")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "lerobot")


def experiment(**data) -> TrainConfig:
    return TrainConfig(policy=PolicyConfig(robot="tabletop", model=tiny_config()), data=DataConfig(**data))


def test_all_frames_of_a_validation_dataset_are_held_out(root):
    found = held_out(experiment(validation_path=str(root)), ROBOT)
    assert found is not None
    dataset = LeRobotDataset(root)
    assert len(found.observations) == sum(LENGTHS)
    expert, inside = dataset.chunk(np.arange(sum(LENGTHS)), 6)
    np.testing.assert_array_equal(found.expert, expert)
    assert not (found.valid & ~inside).any()
    assert [raw["prompt"] for raw in found.observations] == [dataset.task(i) for i in range(sum(LENGTHS))]
    np.testing.assert_array_equal(found.observations[3]["images"]["top"], dataset.image(3, "observation.images.top"))
    few = held_out(experiment(validation_path=str(root)), ROBOT, count=3)
    assert few is not None
    np.testing.assert_array_equal(few.expert, expert[[0, (sum(LENGTHS) - 1) // 2, sum(LENGTHS) - 1]])


def test_a_share_of_the_episodes_is_what_training_held_out(root):
    train = experiment(path=str(root), validation_share=0.5)
    (dataset,) = open_datasets(train.data, train.policy)
    found = held_out(train, ROBOT)
    assert found is not None
    assert 0 < len(dataset.held_out) < len(LENGTHS)
    assert len(found.observations) == sum(LENGTHS[episode] for episode in dataset.held_out)


def test_datasets_of_a_mixture_and_of_rlds_are_read_alike(root, tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="RLDS cannot be read: pip install 'pi0_jax[rlds]'")
    rlds = DatasetConfig(str(write_rlds(tmp_path / "rlds")), keys=RLDS_KEYS)
    both = held_out(experiment(datasets=(DatasetConfig(str(root)), rlds), validation_share=0.5), ROBOT)
    one = held_out(experiment(path=str(root), validation_share=0.5), ROBOT)
    assert both is not None
    assert one is not None
    count = len(one.observations)
    assert len(both.observations) == 2 * count  # episodes are held out by their content, in whatever format
    np.testing.assert_array_equal(both.expert[:count], one.expert)
    order = [np.argsort(expert[:, 0, 0]) for expert in (both.expert[count:], one.expert)]  # episodes come in any order
    np.testing.assert_allclose(both.expert[count:][order[0]], one.expert[order[1]], atol=1e-6)
    state = [np.stack([raw["state"] for raw in raws]) for raws in (both.observations[count:], one.observations)]
    np.testing.assert_allclose(state[0][order[0]], state[1][order[1]], atol=1e-6)


def test_runs_without_held_out_demonstrations_have_none(root, tmp_path):
    assert held_out(None, ROBOT) is None
    assert held_out(experiment(path=str(root)), ROBOT) is None
    assert held_out(experiment(validation_path=str(tmp_path / "moved")), ROBOT) is None
    assert held_out(experiment(validation_path=str(root)), get_robot("aloha")) is None
