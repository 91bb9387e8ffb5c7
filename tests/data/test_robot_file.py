"""`pi0 data robot`: cameras, names and meanings are read off the dataset, with reasons."""

import json
import runpy

import numpy as np
import pytest

from pi0_jax.data.lerobot import LeRobotWriter
from pi0_jax.data.poses import from_model, to_model
from pi0_jax.data.robots import Pose, Poses, Robot, check_robot, get_robot
from pi0_jax.data.source import ACTION, STATE
from pi0_jax.data.tools.pose_names import find_poses
from pi0_jax.data.tools.robot import describe_robot, propose_cameras, propose_semantics
from pi0_jax.errors import UserError


def made(path, text: str) -> Robot:
    (path / "made.py").write_text(text)
    return check_robot(runpy.run_path(str(path / "made.py"))["ROBOT"])


@pytest.mark.parametrize(
    ("cameras", "names"),
    [
        (("front", "wrist"), ("base_0_rgb", "left_wrist_0_rgb")),
        (("front", "top"), ("base_0_rgb", "top_rgb")),
        (("phone", "top", "side"), ("phone_rgb", "base_0_rgb", "side_rgb")),
        (
            ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"),
            ("base_0_rgb", "cam_low_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
        ),
        (("right_hand", "left_hand"), ("right_wrist_0_rgb", "left_wrist_0_rgb")),
        (("observation/exterior_image_1_left", "observation/wrist_image_left"), ("base_0_rgb", "left_wrist_0_rgb")),
        (("wrist", "wrist_2"), ("left_wrist_0_rgb", "wrist_2_rgb")),
        (
            ("observation.head.rgb", "observation.side.rgb", "observation.right_wrist.rgb"),
            ("base_0_rgb", "side_rgb", "right_wrist_0_rgb"),
        ),
        (("left_hand_side", "hand_held", "eye_in_hand"), ("base_0_rgb", "hand_held_rgb", "left_wrist_0_rgb")),
        (("a.rgb", "b.rgb", "a.b.rgb"), ("base_0_rgb", "b_rgb", "a_b_rgb")),
    ],
)
def test_only_cameras_on_a_hand_get_the_slots_of_wrists(cameras, names):
    assert tuple(p.value for p in propose_cameras(cameras).values()) == names


def test_guesses_are_said():
    reasons = {camera: p.reason for camera, p in propose_cameras(("front", "top", "wrist")).items()}
    assert "guess" in reasons["front"]
    assert "model.cameras" in reasons["top"]
    assert not reasons["wrist"]
    assert not propose_cameras(("front", "wrist"))["front"].reason


def test_positions_follow_the_state_and_changes_do_not():
    rng = np.random.default_rng(0)
    state = np.cumsum(rng.normal(size=(500, 3)), axis=0)
    targets = state + rng.normal(0, 0.3, size=state.shape)
    names = ("shoulder", "elbow", "gripper")
    relative = propose_semantics(state, targets, names, names)
    assert [p.value for p in relative] == ["relative", "relative", "gripper"]
    assert "correlation 1.00" in relative[0].reason
    changes = np.diff(state, axis=0, append=state[-1:])
    assert [p.value for p in propose_semantics(state, changes, names, names)] == ["absolute", "absolute", "gripper"]


def test_actions_without_a_state_of_the_same_index_are_absolute():
    state = np.cumsum(np.random.default_rng(0).normal(size=(500, 1)), axis=0)
    wide = np.concatenate([state, state], axis=1)
    proposed = propose_semantics(state, wide, ("x",), ("x", "y"))
    assert [p.value for p in proposed] == ["absolute", "absolute"]


def test_names_of_openpis_conversion_are_understood(tmp_path):
    features = {
        "image": {"dtype": "video", "shape": (16, 16, 3)},
        "wrist_image": {"dtype": "video", "shape": (16, 16, 3)},
    }
    features |= {"state": {"dtype": "float32", "shape": (8,)}, "actions": {"dtype": "float32", "shape": (7,)}}
    rng = np.random.default_rng(0)
    with LeRobotWriter(tmp_path / "libero", 10, "panda", features) as writer:
        numbers = {
            name: rng.normal(size=(6, *features[name]["shape"])).astype(np.float32) for name in ("state", "actions")
        }
        pictures = {name: np.zeros((6, 16, 16, 3), np.uint8) for name in ("image", "wrist_image")}
        writer.add_episode(numbers | pictures, "put it down")
    robot = made(tmp_path, describe_robot(str(tmp_path / "libero"), "mine"))
    assert robot.name == "panda"
    assert robot.cameras == {"image": "base_0_rgb", "wrist_image": "left_wrist_0_rgb"}
    assert (len(robot.state), len(robot.actions), robot.fps) == (8, 7, 10)


def test_a_humanoid_keeps_its_joints_names_from_a_partial_download(real_data, tmp_path):
    folder = real_data / "humanoid_v21"
    info = json.loads((folder / "meta/info.json").read_text())
    robot = made(tmp_path, describe_robot(str(folder), "mine"))
    assert robot.name == info["robot_type"]
    assert list(robot.state) == info["features"]["observation.state"]["names"][0]
    assert list(robot.cameras.values()) == ["base_0_rgb"]
    assert set(robot.semantics) == {"relative"}


def test_a_camera_above_is_not_a_wrist(real_data, tmp_path):
    robot = made(tmp_path, describe_robot(str(real_data / "so101_v3_without_videos"), "mine"))
    assert robot.cameras == {"observation.images.front": "base_0_rgb", "observation.images.top": "top_rgb"}
    assert robot.semantics == (*["relative"] * 5, "gripper")


def test_rlds_is_described_too_and_nothing_is_written_into_it(real_data, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    folder = real_data / "bridge_dataset"
    before = sorted(folder.rglob("*"))
    text = describe_robot(str(folder), "bridge")
    assert "--policy.robot bridge" in text
    robot = made(tmp_path, text)
    assert (robot.name, robot.fps, len(robot.cameras)) == ("bridge", None, 4)
    assert robot.semantics == ("absolute",) * 7
    assert sorted(folder.rglob("*")) == before


EULER = ("x", "y", "z", "roll", "pitch", "yaw")
QUATERNION = ("x", "y", "z", "qx", "qy", "qz", "qw")


def moving(rows: int, rotation: str):
    """A pose that moves, and targets near it."""
    rng = np.random.default_rng(0)
    position, turns = np.cumsum(rng.normal(0, 0.02, size=(2, rows, 3)), axis=1)
    state = from_model(
        to_model(np.concatenate([position, turns], axis=1), (Pose(0, "axis_angle"),)), (Pose(0, rotation),)
    )
    return state, np.concatenate([state[1:], state[-1:]])


@pytest.mark.parametrize(
    ("names", "rotation", "word"),
    [
        (EULER, "euler_xyz", "a guess: about fixed axes"),
        (QUATERNION, "quaternion_xyzw", "of length 1"),
        (("ee.x", "ee.y", "ee.z", "ee.w", "ee.x2", "ee.y2", "ee.z2"), None, None),
        (("pos_x", "pos_y", "pos_z", "quat_w", "quat_x", "quat_y", "quat_z"), "quaternion_wxyz", "of length 1"),
        (("left.x", "left.y", "left.z", "left.wx", "left.wy", "left.wz"), "axis_angle", "a guess"),
        (("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z"), "axis_angle", "by their names"),
        (("x", "y", "z", *(f"rot6d_{i}" for i in range(6))), "6d", "6d_rows"),
        (("dx", "dy", "dz", "droll", "dpitch", "dyaw"), None, None),
    ],
)
def test_poses_are_found_by_their_names(names, rotation, word):
    values, _ = moving(50, rotation or ("quaternion_wxyz" if len(names) == 7 else "euler_xyz"))
    found = find_poses(("gripper", *names), np.concatenate([np.zeros((50, 1)), values], axis=1))
    assert [each.pose for each in found] == ([] if rotation is None else [Pose(1, rotation)])
    assert rotation is None or word in found[0].reason


def test_numbers_that_are_no_rotation_are_not_taken_for_one():
    degrees, _ = moving(50, "euler_xyz")
    degrees[:, 3:] *= 180
    assert not find_poses(EULER, degrees)
    quaternions, _ = moving(50, "quaternion_xyzw")
    assert not find_poses(QUATERNION, 2 * quaternions)


def test_a_pose_that_the_actions_follow_is_relative_and_a_change_of_one_is_none(tmp_path):
    camera = {"observation.images.front": {"dtype": "video", "shape": (16, 16, 3)}}
    for kind, (state_names, rotation) in {
        "targets": (QUATERNION, "quaternion_xyzw"),
        "changes": (EULER, "euler_xyz"),
    }.items():
        state, targets = moving(60, rotation)
        actions = targets if kind == "targets" else targets - state
        gripper = np.arange(60.0)[:, None] % 2
        vectors = {
            "observation.state": np.concatenate([state, gripper], axis=1).astype(np.float32),
            "action": np.concatenate([actions, gripper], axis=1).astype(np.float32),
        }
        names = [*state_names, "gripper"]
        features = camera | {key: {"dtype": "float32", "shape": (len(names),), "names": names} for key in vectors}
        with LeRobotWriter(tmp_path / kind, 10, "arm", features) as writer:
            writer.add_episode(vectors | {name: np.zeros((60, 16, 16, 3), np.uint8) for name in camera}, "go")
        text = describe_robot(str(tmp_path / kind), "mine")
        robot = made(tmp_path, text)
        pose = (Pose(0, rotation),)
        if kind == "targets":
            assert robot.poses == Poses(pose, pose)
            assert robot.semantics == (*["relative"] * 7, "gripper")
            assert "x to qw: by their names" in text
        else:
            assert robot.poses == Poses(pose, ())
            assert robot.semantics == (*["absolute"] * 6, "gripper")


def test_actions_without_names_have_those_of_the_state(tmp_path):
    names = ["shoulder", "elbow", "gripper"]
    vectors = {"observation.state": names, "action": None}
    features = {key: {"dtype": "float32", "shape": (3,), "names": value} for key, value in vectors.items()}
    state = np.cumsum(np.random.default_rng(0).normal(size=(60, 3)), axis=0).astype(np.float32)
    with LeRobotWriter(tmp_path / "data", 10, "arm", features) as writer:
        writer.add_episode({"observation.state": state, "action": state}, "go")
    text = describe_robot(str(tmp_path / "data"), "mine")
    assert "does not name its actions" in text
    robot = made(tmp_path, text)
    assert robot.actions == robot.state == tuple(names)
    assert robot.semantics == ("relative", "relative", "gripper")


def test_built_in_robots_of_the_same_names_are_pointed_at(tmp_path):
    names = [name.removesuffix(".pos") for name in get_robot("so101").state]
    features: dict = {key: {"dtype": "float32", "shape": (6,), "names": names} for key in (STATE, ACTION)}
    features |= {camera: {"dtype": "video", "shape": (16, 16, 3)} for camera in get_robot("so101").cameras}
    frames = {
        name: np.zeros((40, *each["shape"]), np.dtype(each["dtype"].replace("video", "uint8")))
        for name, each in features.items()
    }
    with LeRobotWriter(tmp_path / "data", 30, "arm", features) as writer:
        writer.add_episode(frames, "go")
    assert describe_robot(str(tmp_path / "data"), "mine").endswith("--policy.robot so100 or so101\n")


def test_what_cannot_be_recognised_is_said(tmp_path):
    features = {"picture": {"dtype": "video", "shape": (16, 16, 3)}, "a": {"dtype": "float32", "shape": (3,)}}
    with LeRobotWriter(tmp_path / "odd", 10, "unknown", features) as writer:
        writer.add_episode({"picture": np.zeros((4, 16, 16, 3), np.uint8), "a": np.zeros((4, 3), np.float32)}, "go")
    with pytest.raises(UserError, match=r"has no observation\.state and no action; it has"):
        describe_robot(str(tmp_path / "odd"), "mine")
    robot = made(tmp_path, describe_robot(str(tmp_path / "odd"), "mine", keys={STATE: "a", ACTION: "a"}))
    assert (len(robot.state), len(robot.actions)) == (3, 3)
