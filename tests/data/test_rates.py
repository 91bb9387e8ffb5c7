"""Datasets at another rate: constant velocities and sums of changes stay, and the same rate changes nothing."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pi0_jax.data.poses import Pose, Poses
from pi0_jax.data.rates import Resampled, same_rate
from pi0_jax.data.robots import Robot
from pi0_jax.data.source import ACTION, STATE, VALID, Source
from pi0_jax.errors import UserError

LENGTHS = np.array([7, 1, 12, 20])
ROBOT = Robot(
    "arm",
    {},
    state=("joint", "turn", "gripper"),
    actions=("joint", "turn", "dx", "speed", "gripper"),
    fps=None,
    image_size=(4, 4),
    semantics=("relative", "angle", "absolute", "absolute", "gripper"),
    changes=("dx", "speed"),
    velocities=("speed",),
)


class Made(Source):
    """Episodes of random numbers; the picture of a frame is its number."""

    def __init__(self, fps, state=None, actions=None, lengths=LENGTHS, **others):
        rng, total = np.random.default_rng(0), int(sum(lengths))
        self.root, self.fps, self.tasks, self.skipped = "made", fps, [f"task {i}" for i in range(len(lengths))], {}
        self.ends = np.cumsum(lengths)
        self.episodes = [f"episode {i}" for i in range(len(lengths))]
        numbers = {
            STATE: rng.normal(size=(total, 3)) if state is None else state,
            ACTION: rng.normal(size=(total, 5)) if actions is None else actions,
            **others,
        }
        self.numbers = {name: np.asarray(values, np.float32) for name, values in numbers.items()}
        self.features = {name: {"dtype": "float32", "shape": v.shape[1:]} for name, v in self.numbers.items()}
        self.features["camera"] = {"dtype": "image", "shape": (1, 1, 3)}

    def read(self, name, episodes):
        return np.concatenate([self.numbers[name][slice(*self.episode_range(e))] for e in episodes])

    @property
    def task_index(self):
        return self.episode_of(np.arange(self.num_frames))

    @property
    def shard_ends(self):
        return self.ends[[1, 3]]

    def images(self, camera, rows):
        return np.repeat(np.asarray(rows, np.uint8)[..., None, None, None], 3, -1)

    def picture_files(self, camera):
        return []


def resampled(source, fps, robot=ROBOT):
    return Resampled(source, fps, robot, robot.semantics)


def test_the_same_rate_changes_no_bit():
    source = Made(30, **{VALID: np.arange(40)[:, None] % 5 > 0})
    same = resampled(source, 30)
    for name in (STATE, ACTION, VALID):
        np.testing.assert_array_equal(same.columns(name), source.columns(name))
        assert same.columns(name).dtype == np.float32
    np.testing.assert_array_equal(same.ends, source.ends)
    np.testing.assert_array_equal(same.images("camera", np.arange(40)), source.images("camera", np.arange(40)))


@pytest.mark.parametrize("fps", [7, 10, 15, 29.0, 60, 100])
def test_constant_velocity_stays_constant_and_sums_of_changes_stay(fps):
    time = np.concatenate([np.arange(n) / 30 for n in LENGTHS])
    state = np.stack([0.5 + 2 * time, time, 0 * time], 1)
    random = np.random.default_rng(1).normal(size=time.size)
    actions = np.stack([1.0 + 2 * time, time, random, 0 * time + 3, 0 * time], 1)
    source = Made(30, state, actions)
    found = resampled(source, fps)
    for episode, length in enumerate(LENGTHS):
        rows = slice(*found.episode_range(episode))
        there = np.minimum(np.arange(rows.stop - rows.start) / fps, (length - 1) / 30)
        np.testing.assert_allclose(found.columns(STATE)[rows, 0], 0.5 + 2 * there, rtol=1e-5)
        np.testing.assert_allclose(found.columns(ACTION)[rows, 0], 1 + 2 * there, rtol=1e-5)
        np.testing.assert_allclose(found.columns(ACTION)[rows, 3], 3, rtol=1e-6)
        recorded = source.columns(ACTION)[slice(*source.episode_range(episode)), 2]
        np.testing.assert_allclose(found.columns(ACTION)[rows, 2].sum(), recorded.sum(), atol=1e-5)
        assert abs(there.size / fps - length / 30) < 1 / fps  # it lasts as long


def test_twice_the_time_is_two_changes_and_the_mean_of_two_velocities():
    source = Made(30)
    slow, ours = source.columns(ACTION)[:6], resampled(source, 15).columns(ACTION)[:3]
    np.testing.assert_allclose(ours[:, 2], slow[::2, 2] + slow[1::2, 2], rtol=1e-6)
    np.testing.assert_allclose(ours[:, 3], (slow[::2, 3] + slow[1::2, 3]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(ours[:, [0, 1, 4]], slow[::2][:, [0, 1, 4]])  # frames that are there


def test_grippers_tasks_and_pictures_are_of_the_nearest_frame():
    source = Made(10, actions=np.tile((np.arange(40) % 2)[:, None], (1, 5)))
    fast = resampled(source, 25)  # frames 0, 0.4, 0.8, 1.2, 1.6, 2.0, ... of the recording
    near = [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 6]
    assert fast.lengths[0] == len(near)
    np.testing.assert_array_equal(fast.images("camera", np.arange(18))[:, 0, 0, 0], near)
    np.testing.assert_array_equal(fast.columns(ACTION)[:18, 4], np.array(near) % 2)
    np.testing.assert_array_equal(fast.task_index, fast.episode_of(np.arange(fast.num_frames)))
    np.testing.assert_array_equal(fast.shard_ends, fast.ends[[1, 3]])
    np.testing.assert_array_equal(fast.keeps(np.array([2, 6])), [4, 5, 6, 14, 15, 16, 17])
    assert fast.episode_keys() == source.episode_keys()


def test_frames_of_some_episodes_are_those_of_all():
    found = resampled(Made(30), 20)
    some = np.array([0, 2])
    for name in (STATE, ACTION):
        np.testing.assert_array_equal(found.read(name, some), found.columns(name)[found.frames_of(some)])


def test_angles_go_the_short_way_and_stay_near_a_recorded_one():
    state = np.zeros((2, 3))
    state[:, 1] = 3.1, -3.1
    found = resampled(Made(10, state, np.zeros((2, 5)), [2]), 40).columns(STATE)[:, 1]
    turned = 2 * np.pi - 6.2
    expected = [3.1, 3.1 + turned / 4, 3.1 + turned / 2, -3.1 - turned / 4, -3.1]
    np.testing.assert_allclose(found[:5], expected, rtol=1e-6)


def test_a_step_is_valid_where_all_of_its_time_is():
    valid = np.ones((12, 1))
    valid[3] = 0
    source = Made(30, np.zeros((12, 3)), np.zeros((12, 5)), [12], **{VALID: valid})
    np.testing.assert_array_equal(resampled(source, 15).columns(VALID)[:, 0], [1, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(resampled(source, 20).columns(VALID)[:, 0], [1, 1, 0, 1, 1, 1, 1, 1])


POSED = dataclasses.replace(
    ROBOT,
    state=("x", "y", "z", "qx", "qy", "qz", "qw"),
    actions=("x", "y", "z", "qx", "qy", "qz", "qw"),
    semantics=("relative",) * 7,
    poses=Poses((Pose(0, "quaternion_xyzw"),), (Pose(0, "quaternion_xyzw"),)),
    changes=(),
    velocities=(),
)


def test_rotations_turn_evenly_whatever_the_signs_of_quaternions():
    turns = Rotation.from_rotvec(np.outer(np.arange(8) * 0.2, [0.6, 0.8, 0]))
    poses = np.concatenate([np.zeros((8, 3)), turns.as_quat()], 1)
    poses[1::2, 3:] *= -1
    source = Made(10, poses, poses, [8])
    found = resampled(source, 20, POSED).columns(ACTION)
    expected = Rotation.from_rotvec(np.outer(np.arange(15) * 0.1, [0.6, 0.8, 0]))
    angles = (Rotation.from_quat(found[:15, 3:]) * expected.inv()).magnitude()
    assert angles.max() < 1e-4
    np.testing.assert_array_equal(found[:15:2], poses.astype(np.float32))  # recorded ones are as they were


def test_poses_that_are_changes_and_rates_that_are_none_are_refused():
    with pytest.raises(UserError, match=r"\['x'\] of arm are changes and part of a pose"):
        resampled(Made(10), 20, dataclasses.replace(POSED, changes=("x",)))
    with pytest.raises(UserError, match="rate that datasets are brought to is 0"):
        resampled(Made(10), 0)
    assert same_rate(29.97, 30)
    assert not same_rate(25, 30)
