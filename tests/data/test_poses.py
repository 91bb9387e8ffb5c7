"""Poses: any representation of a rotation gives the same numbers for the model, and comes back as it went in."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_jax.config import ModelConfig, PolicyConfig, VisionConfig
from pi0_jax.data.normalization import Normalization, NormStats
from pi0_jax.data.poses import absolute, from_model, relative, steady_signs, to_model
from pi0_jax.data.robots import ROBOTS, Pose, Poses, Robot, check_robot, get_robot, semantics_of
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import adapt, chain, make_transform, relative_actions, relative_dims
from pi0_jax.errors import UserError
from tests.data.stats import compute_stats
from tests.data.test_normalization import in_memory

ROTATIONS = ("quaternion_xyzw", "quaternion_wxyz", "axis_angle", "euler_xyz", "euler_ZYX", "euler_zyz", "6d", "6d_rows")


def rodrigues(vector):
    """The matrix of an axis times an angle, by Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def about(axis, angle):
    return rodrigues(np.eye(3)["xyz".index(axis)] * angle) if angle else np.eye(3)


def by_hand(numbers, rotation):
    """The matrix of a rotation, without the code that is tested."""
    if rotation.startswith("quaternion"):
        x, y, z, w = numbers if rotation.endswith("xyzw") else (*numbers[1:], numbers[0])
        length = np.linalg.norm(numbers)
        angle, axis = 2 * np.arctan2(np.linalg.norm([x, y, z]), w), np.array([x, y, z]) / length
        return rodrigues(axis / np.linalg.norm(axis) * angle)
    if rotation == "axis_angle":
        return rodrigues(numbers)
    if rotation.startswith("euler"):
        order = rotation[-3:]
        first, second, third = (about(axis, angle) for axis, angle in zip(order.lower(), numbers, strict=True))
        return third @ second @ first if order.islower() else first @ second @ third
    columns = np.stack([numbers[:3], numbers[3:], np.cross(numbers[:3], numbers[3:])], axis=1)
    return columns if rotation == "6d" else columns.T


def draw(rotation, random, *batch):
    """Random rotations: quaternions, axes and angles of any size, two vectors at right angles."""
    if rotation.startswith("quaternion"):
        values = random.normal(size=(*batch, 4))
        return values / np.linalg.norm(values, axis=-1, keepdims=True)
    if rotation.startswith("6d"):
        first, other = random.normal(size=(2, *batch, 3))
        second = np.cross(first, other)
        return np.concatenate([v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (first, second)], axis=-1)
    return random.uniform(-3, 3, size=(*batch, 3))


def homogeneous(pose, rotation):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = by_hand(pose[3:], rotation), pose[:3]
    return matrix


def draw_poses(rotation, random, *batch):
    return np.concatenate([random.normal(size=(*batch, 3)), draw(rotation, random, *batch)], axis=-1)


def make_robot(state, actions, semantics="relative"):
    """A gripper, a joint and then a pose in the state; a gripper, a joint and then a pose in the actions."""
    widths = [Pose(2, rotation).end - 2 for rotation in (state, actions)]
    names = [("gripper", "joint", *(f"p{i}" for i in range(width))) for width in widths]
    robot = Robot(
        "arm",
        {"observation.images.top": "base_0_rgb"},
        *names,
        fps=None,
        image_size=(8, 8),
        semantics=("gripper", "relative", *[semantics] * widths[1]),
        poses=Poses((Pose(2, state),), (Pose(2, actions),)),
    )
    return check_robot(robot)


def both(robot):
    return chain(adapt(robot), relative_actions(semantics_of(robot, {}), robot.poses))


@pytest.mark.parametrize("rotation", ROTATIONS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_model_reads_two_columns_of_the_matrix(rotation, seed):
    values = draw_poses(rotation, np.random.default_rng(seed))
    matrix = by_hand(values[3:], rotation)
    expected = np.concatenate([values[:3], matrix[:, 0], matrix[:, 1]])
    np.testing.assert_allclose(to_model(values, (Pose(0, rotation),)), expected, atol=1e-9)


@pytest.mark.parametrize("actions", ROTATIONS)
@pytest.mark.parametrize("state", ROTATIONS)
def test_relative_poses_are_those_of_homogeneous_matrices(state, actions):
    random = np.random.default_rng(0)
    robot = make_robot(state, actions)
    anchor = np.concatenate([random.normal(size=(3, 2)), draw_poses(state, random, 3)], axis=-1)
    chunk = np.concatenate([random.normal(size=(3, 4, 2)), draw_poses(actions, random, 3, 4)], axis=-1)
    transform = both(robot)
    sample = transform.forward({"state": anchor, "actions": chunk})
    assert sample["actions"].shape == (3, 4, 11)
    for b, step in np.ndindex(3, 4):
        expected = np.linalg.inv(homogeneous(anchor[b, 2:], state)) @ homogeneous(chunk[b, step, 2:], actions)
        columns = expected[:3, [3, 0, 1]].T.ravel()
        np.testing.assert_allclose(sample["actions"][b, step, 2:], columns, atol=1e-6)
    np.testing.assert_allclose(sample["actions"][..., 0], chunk[..., 0])
    np.testing.assert_allclose(sample["actions"][..., 1], chunk[..., 1] - anchor[:, None, 1])
    back = transform.inverse({"actions": sample["actions"], "anchor": sample["anchor"], "state": sample["state"]})
    for key, given_, rotation in (("actions", chunk, actions), ("state", anchor, state)):
        assert back[key].shape == given_.shape
        np.testing.assert_allclose(back[key][..., :5], given_[..., :5], atol=1e-6)
        for index in np.ndindex(given_.shape[:-1]):
            same = [by_hand(values[index][5:], rotation) for values in (back[key], given_)]
            np.testing.assert_allclose(*same, atol=1e-6)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_numbers_in_their_usual_range_come_back_as_they_are(rotation):
    values = draw_poses(rotation, np.random.default_rng(1), 50)
    if rotation.startswith("quaternion"):
        w = values[:, [6 if rotation.endswith("w") else 3]]
        values[:, 3:] *= np.sign(w)
    elif not rotation.startswith("6d"):
        values[:, 3:] *= 0.5  # within half a turn, and the middle angle within a quarter
        values[:, 4] = np.abs(values[:, 4]) + 0.01 if rotation == "euler_zyz" else values[:, 4]
    poses = (Pose(0, rotation),)
    np.testing.assert_allclose(from_model(to_model(values, poses), poses), values, atol=1e-6)


@pytest.mark.parametrize("rotation", [name for name in ROTATIONS if not name.startswith("6d")])
def test_signs_of_quaternions_and_whole_turns_change_nothing(rotation):
    random = np.random.default_rng(2)
    robot = make_robot(rotation, rotation)
    anchor, chunk = random.normal(size=(5, 2)), random.normal(size=(5, 6, 2))
    anchor = np.concatenate([anchor, draw_poses(rotation, random, 5)], axis=-1)
    chunk = np.concatenate([chunk, draw_poses(rotation, random, 5, 6)], axis=-1)
    forward = both(robot).forward
    plain = forward({"state": anchor, "actions": chunk})
    for values in (anchor, chunk):
        turned = values[..., 5:]
        if rotation.startswith("quaternion"):
            turned *= random.choice([-1, 1], size=(*turned.shape[:-1], 1))
        elif rotation == "axis_angle":
            turned *= 1 - 2 * np.pi / np.linalg.norm(turned, axis=-1, keepdims=True)
        else:
            turned += 2 * np.pi * random.integers(-2, 3, size=turned.shape)
    again = forward({"state": anchor, "actions": chunk})
    for key in ("state", "actions"):
        np.testing.assert_allclose(again[key], plain[key], atol=1e-9)


@pytest.mark.parametrize("rotation", ["axis_angle", "euler_xyz"])
def test_both_sides_of_half_a_turn_are_near_one_another(rotation):
    poses = (Pose(0, rotation),)
    before, after = np.zeros((2, 6))
    before[3], after[3] = np.pi - 1e-4, -np.pi + 1e-4
    np.testing.assert_allclose(to_model(before, poses), to_model(after, poses), atol=3e-4)


def test_a_prediction_that_is_no_rotation_is_brought_to_one():
    random = np.random.default_rng(3)
    anchor = to_model(draw_poses("axis_angle", random, 4), (Pose(0, "axis_angle"),))[:, None]
    predicted = random.normal(size=(4, 6, 9))
    found = from_model(absolute(predicted, anchor), (Pose(0, "6d"),))[..., 3:]
    first, second = found[..., :3], found[..., 3:]
    np.testing.assert_allclose(np.linalg.norm([first, second], axis=-1), 1, atol=1e-12)
    np.testing.assert_allclose((first * second).sum(-1), 0, atol=1e-12)
    np.testing.assert_allclose(relative(absolute(predicted, anchor), anchor), predicted, atol=1e-12)


def test_quaternions_of_a_chunk_never_change_sign():
    # Turns about x, from 170° to 190°: w changes sign on the way.
    angles = np.radians(np.linspace(170, 190, 9))
    chunk = np.zeros((9, 7))
    chunk[:, 3], chunk[:, 6] = np.sin(angles / 2), np.cos(angles / 2)
    poses = (Pose(0, "quaternion_xyzw"),)
    came = from_model(to_model(chunk, poses), poses)
    assert (came[:, 3] < 0).any()
    both_ways = Poses(poses, poses)
    np.testing.assert_allclose(steady_signs(came, both_ways), chunk, atol=1e-6)
    for sign in (1, -1):  # the state's decides
        np.testing.assert_allclose(steady_signs(came, both_ways, sign * chunk[0]), sign * chunk, atol=1e-6)
    robot = dataclasses.replace(make_robot("euler_xyz", "quaternion_xyzw"), semantics=())
    whole = np.concatenate([np.zeros((9, 2)), chunk], axis=-1)
    transform = both(robot)
    state = np.zeros(8)
    back = transform.inverse(transform.forward({"state": state, "actions": whole}))
    np.testing.assert_allclose(back["actions"], whole, atol=1e-6)


def test_absolute_poses_are_only_written_otherwise():
    random = np.random.default_rng(4)
    robot = make_robot("quaternion_wxyz", "axis_angle", "absolute")
    state = np.concatenate([random.normal(size=2), draw_poses("quaternion_wxyz", random)])
    actions = np.concatenate([random.normal(size=(3, 2)), draw_poses("axis_angle", random, 3)], axis=-1)
    sample = both(robot).forward({"state": state, "actions": actions})
    np.testing.assert_array_equal(sample["actions"][:, 2:], to_model(actions[:, 2:], (Pose(0, "axis_angle"),)))
    assert relative_dims(semantics_of(robot, {}), robot.poses) == [1]


def test_two_arms_are_each_relative_to_their_own_pose():
    random = np.random.default_rng(5)
    names = tuple(f"a{i}" for i in range(14))
    poses = (Pose(0, "quaternion_xyzw"), Pose(7, "quaternion_xyzw"))
    robot = Robot("two", {}, names, names, None, (8, 8), semantics=("relative",) * 14, poses=Poses(poses, poses[::-1]))
    state, actions = draw_poses("quaternion_xyzw", random, 2).ravel(), draw_poses("quaternion_xyzw", random, 2).ravel()
    found = both(check_robot(robot)).forward({"state": state, "actions": actions[None]})["actions"][0]
    for target, origin in ((1, 0), (0, 1)):  # the first of the actions is in dimensions 7 to 13
        start = slice(7 * target, 7 * target + 7), slice(7 * origin, 7 * origin + 7)
        one = [homogeneous(values[own], "quaternion_xyzw") for values, own in zip((actions, state), start, strict=True)]
        expected = (np.linalg.inv(one[1]) @ one[0])[:3, [3, 0, 1]].T.ravel()
        np.testing.assert_allclose(found[9 * target : 9 * target + 9], expected, atol=1e-9)


def test_a_whole_transform_undoes_itself_and_is_told_the_models_dimensions():
    robot = make_robot("quaternion_xyzw", "euler_xyz")
    assert robot.model_state == ("gripper", "joint", "p0", "p1", "p2", *columns("p0"))
    assert len(robot.model_actions) == 11
    random = np.random.default_rng(6)
    stats = {key: NormStats(random.normal(size=11), random.uniform(0.5, 2, 11)) for key in ("state", "actions")}
    model = ModelConfig(vision=VisionConfig(image_size=16), action_horizon=3, vocab_size=512)
    tokenizer = Tokenizer.train(["do nothing"], 512)
    normalization = Normalization(stats, semantics_of(robot, {}))
    transform = make_transform(PolicyConfig(model=model, robot="mine.py"), robot, normalization, tokenizer)
    example = robot.example()
    assert example["state"][-1] == 1
    actions = random.uniform(-1, 1, (3, 8))
    sample = transform.forward({**example, "actions": actions, "previous": np.stack([robot.example_action()] * 2)})
    assert sample["actions"].shape == (3, 32)
    assert sample["previous"].shape == (2, 32)
    assert not sample["actions"][:, 11:].any()
    back = transform.inverse({key: sample[key] for key in ("state", "actions", "anchor", "reported")})
    np.testing.assert_allclose(back["actions"], actions, atol=1e-5)
    np.testing.assert_allclose(back["state"], example["state"], atol=1e-5)
    narrow = PolicyConfig(model=dataclasses.replace(model, action_dim=10), robot="mine.py")
    with pytest.raises(UserError, match="11 state and 11 action dimensions, nine of each pose"):
        make_transform(narrow, robot, normalization, tokenizer)
    few = {key: NormStats(np.zeros(9), np.ones(9)) for key in stats}
    with pytest.raises(UserError, match="have 9 dimensions; the robot has 11"):
        make_transform(PolicyConfig(model=model, robot="mine.py"), robot, normalization._replace(stats=few), tokenizer)


def columns(prefix):
    return tuple(f"{prefix}r{row}{column}" for column in (1, 2) for row in (1, 2, 3))


def test_statistics_are_of_what_the_model_sees():
    random, robot, horizon = np.random.default_rng(7), make_robot("axis_angle", "quaternion_wxyz"), 3
    state = np.concatenate([random.normal(size=(20, 2)), draw_poses("axis_angle", random, 20)], axis=-1)
    actions = np.concatenate([random.normal(size=(20, 2)), draw_poses("quaternion_wxyz", random, 20)], axis=-1)
    source = in_memory(state, actions, np.ones((20, 1)), (12, 8))
    stats = compute_stats(source, robot, semantics_of(robot, {}), horizon)
    seen = {"state": [], "actions": []}
    for i in range(20):
        chunk = actions[i : min(i + horizon, 12 if i < 12 else 20)]
        sample = both(robot).forward({"state": state[i], "actions": chunk})
        seen["state"].append(sample["state"][None])
        seen["actions"].append(sample["actions"])
    for key, rows in seen.items():
        mean = np.concatenate(rows).mean(0)
        if key == "actions":  # a gripper is taken once per frame
            mean[0] = actions[:, 0].mean()
        np.testing.assert_allclose(stats[key].mean, mean, atol=1e-9)


@pytest.mark.parametrize("name", ROBOTS)
def test_robots_without_poses_keep_their_numbers(name):
    robot, random = get_robot(name), np.random.default_rng(0)
    semantics = semantics_of(robot, {})
    assert (robot.model_state, robot.model_actions) == (robot.state, robot.actions)
    state = random.uniform(0.1, 0.9, len(robot.state)).astype(np.float32)
    actions = random.uniform(0.1, 0.9, (5, len(robot.actions))).astype(np.float32)
    sample = both(robot).forward({"state": state, "actions": actions})
    if robot.adapt is not None:
        state, actions = robot.adapt.state(state), robot.adapt.actions(actions)
    for i, kind in enumerate(semantics):
        expected = actions[:, i] - state[i] if kind == "relative" else actions[:, i]
        np.testing.assert_array_equal(sample["actions"][:, i], expected)
    np.testing.assert_array_equal(sample["state"], state)


def test_what_is_no_pose_is_refused():
    robot = make_robot("quaternion_xyzw", "euler_xyz")
    for state, message in (
        (Pose(2, "quaternion"), "expected one of quaternion_xyzw"),
        (Pose(3, "quaternion_xyzw"), "dimensions 3 to 9, which do not exist"),
    ):
        with pytest.raises(UserError, match=message):
            check_robot(dataclasses.replace(robot, poses=robot.poses._replace(state=(state,))))
    twice = (Pose(0, "axis_angle"), Pose(2, "axis_angle"))
    with pytest.raises(UserError, match="belong to another pose"):
        check_robot(dataclasses.replace(robot, poses=robot.poses._replace(state=twice)))
    with pytest.raises(UserError, match="are a pose and of semantics"):
        check_robot(dataclasses.replace(robot, semantics=("relative",) * 7 + ("absolute",)))
    with pytest.raises(UserError, match="the state has 0 poses"):
        check_robot(dataclasses.replace(robot, poses=robot.poses._replace(state=())))
    with pytest.raises(UserError, match="part of a pose"):
        check_robot(dataclasses.replace(robot, semantics=("relative",) * 8, poses=robot.poses._replace(actions=())))
    with pytest.raises(UserError, match="length 0 or parallel"):
        to_model(np.zeros((2, 7)), (Pose(0, "quaternion_wxyz"),))
