"""Recordings: balanced, reproducible, and honest about which actions are the expert's."""

import json

import numpy as np
import pytest

import pi0_jax.data.lerobot as lerobot
from pi0_jax.data.robots import get_robot
from pi0_jax.errors import UserError
from pi0_jax.evaluate.record import Noise, Source, demonstrations, features, record
from pi0_jax.evaluate.simulators.tabletop.expert import expert_action
from pi0_jax.evaluate.simulators.tabletop.scene import MAX_ACTION
from pi0_jax.evaluate.simulators.tabletop.tabletop import TabletopEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import TASK_SETS, TASKS, find_task


def source(image_size: int = 8, **changes) -> Source:
    return Source("tabletop", options=(("image_size", image_size),), **changes)


NOISY = source(16, noise=Noise(rate=0.15))


@pytest.fixture(scope="module")
def episodes():
    return list(demonstrations(NOISY, 36, workers=1))


def test_columns_are_those_announced(episodes):
    robot = get_robot("tabletop")
    announced = features(episodes[0].frames, robot)
    assert set(announced) == {*robot.cameras, "observation.state", "action", "valid"}
    for episode in episodes:
        assert set(episode.frames) == set(announced)
        lengths = {len(values) for values in episode.frames.values()}
        assert len(lengths) == 1
        for name, values in episode.frames.items():
            assert values.shape[1:] == announced[name]["shape"]
            assert values.dtype == (np.uint8 if announced[name]["dtype"] == "video" else announced[name]["dtype"])


def test_tasks_take_turns_and_seeds_differ(episodes):
    assert [episode.task for episode in episodes] == [task.name for task in TASKS] * 6
    assert len({episode.seed for episode in episodes}) == len(episodes)
    assert all(episode.prompt in find_task(episode.task).prompts for episode in episodes)


def test_replaying_a_recording_succeeds_and_valid_marks_exactly_the_experts_actions(episodes):
    env = TabletopEnv(lazy_images=True)
    valid_share = []
    for episode in episodes:
        observation, _ = env.reset(seed=episode.seed, options={"task": episode.task})
        frames = episode.frames
        for t, action in enumerate(frames["action"]):
            np.testing.assert_array_equal(observation["state"], frames["observation.state"][t])
            wanted = expert_action(env.task, env.snapshot())
            assert np.array_equal(wanted, action) == bool(frames["valid"][t, 0])
            observation, _, terminated, _, _ = env.step(action)
            assert terminated == (t == len(frames["action"]) - 1)
        valid_share.append(frames["valid"].mean())
        assert np.abs(frames["action"]).max() <= np.float32(MAX_ACTION)
    assert 0.5 < np.mean(valid_share) < 0.95


def test_without_noise_every_action_is_the_experts():
    quiet = list(demonstrations(source(noise=Noise(rate=0.0)), 6, workers=1))
    assert all(episode.frames["valid"].all() for episode in quiet)


def test_recording_is_the_same_for_any_number_of_workers(episodes):
    again = list(demonstrations(NOISY, 36, workers=2))
    for a, b in zip(episodes, again, strict=True):
        assert (a.task, a.prompt, a.seed, a.dropped) == (b.task, b.prompt, b.seed, b.dropped)
        for name in a.frames:
            np.testing.assert_array_equal(a.frames[name], b.frames[name])


def test_splits_and_seeds_give_other_layouts():
    def layouts(**kwargs):
        return {e.seed for e in demonstrations(source(**kwargs), 2, workers=1)}

    drawn = [layouts(), layouts(seed=1), layouts(split="validation"), layouts(split="validation", seed=1)]
    assert len(set.union(*drawn)) == 8


def test_evaluation_layouts_are_never_recorded():
    with pytest.raises(ValueError, match="evaluation"):
        source(split="evaluation")
    with pytest.raises(ValueError, match="another seed"):
        next(demonstrations(source(), 10**6))


def test_noise_that_leaves_no_time_to_finish_is_reported():
    with pytest.raises(UserError, match="Lower their rate"):
        next(demonstrations(source(noise=Noise(rate=1.0, max_steps=40)), 1, workers=1))


def test_recorded_dataset_reads_back_with_its_story(tmp_path):
    root = tmp_path / "demos"
    asked = source(16, split="validation", seed=3)
    summary = record(root, asked, 12, workers=1)
    assert json.loads((root / "meta" / "recording.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["split"], summary["seed"], len(summary["episodes"])) == ("validation", 3, 12)
    dataset = lerobot.LeRobotDataset(root)
    expected = list(demonstrations(asked, 12, workers=1))
    for name in ("action", "valid", "observation.state"):
        np.testing.assert_array_equal(dataset.columns(name), np.concatenate([e.frames[name] for e in expected]))
    assert summary["frames"] == sum(len(e.frames["action"]) for e in expected)
    assert dataset.task(0) == expected[0].prompt


def test_other_tasks_are_recorded_by_the_name_of_their_set():
    found = list(demonstrations(Source("tabletop_centre"), 4, workers=1))
    names = [task.name for task in TASK_SETS["centre"]]
    assert [episode.task for episode in found] == [*names, names[0]]
    with pytest.raises(ValueError, match=r"no simulator 'desk'; there are .*tabletop, tabletop_centre"):
        next(demonstrations(Source("desk"), 1))
