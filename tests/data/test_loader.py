"""The loader: every frame once an epoch, the same again after a stop, and shards that make one batch together."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from pi0_jax.data import loader as loading
from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter
from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.normalization import Normalization, unnormalize_values
from pi0_jax.data.robots import get_robot
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import make_transform
from tests.data.conftest import FEATURES, all_frames, episode
from tests.data.stats import compute_stats

ABSOLUTE = ("absolute",) * 3


def opened(dataset):
    """The dataset alone, all its episodes to train on and to validate with."""
    every = np.arange(dataset.num_episodes)
    robot = get_robot("tabletop")
    return OpenDataset(dataset, robot, robot.cameras, ABSOLUTE, None, "tabletop", every, every)


def make_loader(dataset, transform, config, *rows):
    return loading.make_loader([(opened(dataset), transform)], config, *rows)


def eval_batches(dataset, transform, config, *rows):
    return loading.eval_batches([(opened(dataset), transform)], config, *rows)


@pytest.fixture
def transform(dataset, config):
    normalization = Normalization(compute_stats(dataset), ABSOLUTE)
    return make_transform(config.policy, get_robot("tabletop"), normalization, Tokenizer.train(dataset.tasks, 512))


def frames_in(batch, dataset):
    """Indices of the frames that a batch was made of, found by their states."""
    state = unnormalize_values(batch.observation.state[:, :6], compute_stats(dataset)["state"], "zscore")
    return np.abs(dataset.columns("observation.state")[None] - state[:, None]).sum(-1).argmin(1)


def counted(dataset, i, horizon=4):
    """Which steps of the chunk at frame `i` are inside the episode and before the first invalid one."""
    inside, valid = dataset.chunk(i, horizon)[1], dataset.chunk(i, horizon, "valid")[0][:, 0] > 0
    return inside & np.logical_and.accumulate(valid)


def learnable(dataset):
    return [i for i in range(dataset.num_frames) if counted(dataset, i).any()]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_batch_holds_what_the_dataset_holds(dataset, transform, config):
    batch = next(make_loader(dataset, transform, config))
    stats = compute_stats(dataset)
    for row, i in enumerate(frames_in(batch, dataset)):
        actions, _ = dataset.chunk(i, 4)
        np.testing.assert_allclose(
            unnormalize_values(batch.actions[row, :, :3], stats["actions"], "zscore"), actions, atol=1e-6
        )
        np.testing.assert_array_equal(batch.actions[row, :, 3:], 0)
        np.testing.assert_array_equal(batch.step_mask[row], counted(dataset, i))
        np.testing.assert_array_equal(batch.observation.images["top"][row], dataset.image(i, "observation.images.top"))
        np.testing.assert_array_equal(
            batch.observation.images["tool"][row], dataset.image(i, "observation.images.tool")
        )
        expected = transform.forward({"images": {}, "state": np.zeros(6), "prompt": dataset.task(i)})["prompt"]
        np.testing.assert_array_equal(batch.observation.prompt[row], expected)
    np.testing.assert_array_equal(batch.dim_mask, np.tile(np.arange(8) < 3, (6, 1)))
    assert batch.observation.images["top"].dtype == np.uint8
    assert batch.actions.dtype == batch.observation.state.dtype == np.float32


def test_each_epoch_visits_every_frame_once_in_another_order(dataset, transform, config):
    frames = learnable(dataset)
    batches = take(make_loader(dataset, transform, config), len(frames))  # six epochs, as six make a batch
    visited = np.concatenate([frames_in(batch, dataset) for batch in batches]).reshape(6, len(frames))
    np.testing.assert_array_equal(np.sort(visited, 1), np.tile(frames, (6, 1)))
    assert len({tuple(epoch) for epoch in visited}) == 6


def test_same_seed_same_batches_other_seed_other_batches(dataset, transform, config):
    once, again = (take(make_loader(dataset, transform, config), 3) for _ in range(2))
    assert_equal(once, again)
    other = take(make_loader(dataset, transform, dataclasses.replace(config, seed=1)), 3)
    assert (frames_in(other[0], dataset) != frames_in(once[0], dataset)).any()


@pytest.mark.parametrize("stop", [0, 2, 7])
def test_resuming_equals_never_stopping(dataset, transform, config, stop):
    unbroken = make_loader(dataset, transform, config)
    take(unbroken, stop)
    state = unbroken.get_state()
    resumed = make_loader(dataset, transform, config)
    resumed.set_state(state)
    assert_equal(take(unbroken, 8), take(resumed, 8))


def test_number_of_threads_changes_nothing(dataset, transform, config):
    def batches(threads):
        data = dataclasses.replace(config.data, num_threads=threads, prefetch=threads)
        return take(make_loader(dataset, transform, dataclasses.replace(config, data=data)), 8)

    assert_equal(batches(0), batches(4))


def test_a_process_that_asks_for_rows_gets_those_of_the_batch_of_one_process(dataset, transform, config):
    whole = take(make_loader(dataset, transform, config), 4)
    for rows in (np.array([0, 1]), np.array([4, 5]), np.array([0, 3]), np.arange(6)):
        some = take(make_loader(dataset, transform, config, rows), 4)
        assert_equal(some, jax.tree.map(lambda leaf: leaf[rows], whole))
    every, some = (
        list(eval_batches(dataset, transform, config)),
        list(eval_batches(dataset, transform, config, rows[3:])),
    )
    assert_equal(some, jax.tree.map(lambda leaf: leaf[3:], every))


def test_prompts_are_padded_to_the_first_length_that_holds_those_of_all_processes(dataset, config):
    model = dataclasses.replace(config.policy.model, variant="pi05", prompt_length=64)
    tokens = Tokenizer.train(dataset.tasks, 512)
    policy = dataclasses.replace(config.policy, model=model)
    transform = make_transform(policy, get_robot("tabletop"), Normalization(compute_stats(dataset), ABSOLUTE), tokens)
    config = dataclasses.replace(config, policy=policy, batch_size=2)
    whole = take(make_loader(dataset, transform, config), 8)
    needed = [int(batch.observation.prompt_mask.sum(1).max()) for batch in whole]
    assert min(needed) < max(needed)  # the state is in the prompt
    buckets = (4, min(needed), max(needed) - 1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_buckets=buckets))
    shortened = take(make_loader(dataset, transform, config), 8)
    lengths = [batch.observation.prompt.shape[1] for batch in shortened]
    assert lengths == [next((b for b in buckets if b >= n), 64) for n in needed]
    assert set(lengths) == {*buckets[1:], 64}
    for rows in ([0], [1]):
        some = take(make_loader(dataset, transform, config, np.array(rows)), 8)
        assert_equal(some, jax.tree.map(lambda leaf: leaf[rows], shortened))
    for before, after in zip(whole, shortened, strict=True):
        length = after.observation.prompt.shape[1]
        assert_equal(after.observation.prompt, before.observation.prompt[:, :length])
        assert not before.observation.prompt_mask[:, length:].any()
    every, part = (list(eval_batches(dataset, transform, config, *rows)) for rows in ((), (np.array([1]),)))
    assert_equal(part, jax.tree.map(lambda leaf: leaf[1:], every))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_buckets=(32, 80)))
    with pytest.raises(ValueError, match=r"ascending lengths from 1 to the model's prompt_length, 64"):
        make_loader(dataset, transform, config)


def test_evaluation_visits_every_frame_once_in_order_and_masks_the_filling(dataset, transform, config):
    batches = list(eval_batches(dataset, transform, config))
    frames = learnable(dataset)
    assert len(batches) == -(-len(frames) // 6)
    assert all(len(batch.actions) == 6 for batch in batches)
    visited = np.concatenate([frames_in(batch, dataset) for batch in batches])
    np.testing.assert_array_equal(visited[: len(frames)], frames)
    learnt = np.concatenate([batch.step_mask.any(1) for batch in batches])
    np.testing.assert_array_equal(learnt, np.arange(len(learnt)) < len(frames))


def recorded(root, valid, fps=5, features=FEATURES):
    with LeRobotWriter(root, fps, "tabletop", features) as writer:
        values = episode(0) | {"valid": np.array(valid, np.float32)[:, None]}
        writer.add_episode({name: values[name] for name in features}, "reach")
    return LeRobotDataset(root)


def test_chunks_count_up_to_their_first_invalid_step(transform, config, tmp_path):
    dataset = recorded(tmp_path / "data", [1, 1, 0, 0, 1, 1, 0, 0, 1])  # frames 0, 1, 4, 5 and 8 begin with a valid one
    (batch,) = eval_batches(dataset, transform, config)
    top = all_frames(dataset, "observation.images.top")
    np.testing.assert_array_equal(batch.observation.images["top"][:5], top[[0, 1, 4, 5, 8]])
    np.testing.assert_array_equal(
        batch.step_mask, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    )


def test_without_a_column_of_validity_all_steps_count(transform, config, tmp_path):
    features = {name: feature for name, feature in FEATURES.items() if name != "valid"}
    dataset = recorded(tmp_path / "data", np.zeros(9), features=features)
    batches = list(eval_batches(dataset, transform, config))
    assert sum(batch.step_mask.sum() for batch in batches) == 6 * 4 + 3 + 2 + 1


def test_dataset_of_another_robot_is_refused(dataset, transform, config, tmp_path):
    with pytest.raises(ValueError, match="20 frames per second; tabletop acts at 5"):
        make_loader(recorded(tmp_path / "fast", np.ones(9), fps=20), transform, config)
    without = {name: feature for name, feature in FEATURES.items() if name != "observation.images.tool"}
    with pytest.raises(ValueError, match=r"lacks video \['observation\.images\.tool'\]"):
        make_loader(recorded(tmp_path / "blind", np.ones(9), features=without), transform, config)
    with pytest.raises(ValueError, match="nothing to learn"):
        make_loader(recorded(tmp_path / "invalid", np.zeros(9)), transform, config)
