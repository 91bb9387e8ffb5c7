"""HDF5 of robomimic, LIBERO and ALOHA becomes LeRobot 3.0: its pictures, states, actions and words, or says why not."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pi0_jax import cli
from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.hdf5.layout import Hdf5Options
from pi0_jax.data.hdf5.reader import Hdf5Dataset
from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter
from pi0_jax.data.lerobot.merge import convert
from pi0_jax.data.mixture import open_source
from pi0_jax.data.poses import Pose
from pi0_jax.data.robots import get_robot
from pi0_jax.data.tools.pose_names import find_poses
from tests.data.conftest import all_frames, scene
from tests.data.formats import png
from tests.data.test_lerobot_versions import own_frame_is_nearest

h5py = pytest.importorskip("h5py")

LIBERO = {"problem_info": json.dumps({"language_instruction": "open the drawer"})}
ENVIRONMENT = {"env_args": json.dumps({"env_kwargs": {"control_freq": 20, "robots": ["Panda"]}})}


def demonstration(seed: int, length: int, state: int, actions: int) -> tuple[np.ndarray, ...]:
    """Pictures, states and actions that no other seed has."""
    rng = np.random.default_rng(seed)
    images = np.stack([scene(100 * seed + i) for i in range(length)])
    return images, rng.normal(size=(length, state)), rng.normal(size=(length, actions))


def write_libero(path: Path, seeds=(0, 1), attributes: dict | None = None) -> None:
    """A file of LIBERO's layout; demo_2 of 11 comes after demo_1 and before demo_10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs.update(LIBERO | ENVIRONMENT if attributes is None else attributes)
        for number, seed in zip((10, 2), seeds[::-1], strict=False):
            images, state, actions = demonstration(seed, 4 + seed, 8, 7)
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = actions
            demo["dones"], demo["rewards"], demo["states"] = (np.zeros((len(actions), n)) for n in (1, 1, 30))
            obs = demo.create_group("obs")
            obs.create_dataset("agentview_rgb", data=images[:, ::-1, ::-1], compression="gzip")
            obs["eye_in_hand_rgb"] = images[:, ::-1]
            obs["agentview_depth"] = np.zeros((*images.shape[:3], 1), np.float32)
            obs["ee_pos"], obs["ee_ori"], obs["gripper_states"] = state[:, :3], state[:, 3:6], state[:, 6:]
            obs["joint_states"] = state[:, :7] + 1


def write_robomimic(path: Path, length: int = 6) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs.update(ENVIRONMENT)
        images, state, actions = demonstration(3, length, 9, 7)
        obs = file.create_group("data/demo_0/obs")
        file["data/demo_0/actions"] = actions
        obs["agentview_image"] = images[:, :47, :45]  # video has even sizes
        obs["robot0_eef_pos"], obs["robot0_eef_quat"] = state[:, :3], state[:, 3:7]
        obs["robot0_gripper_qpos"] = state[:, 7:]


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "jpeg", quality=95)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def padded(pictures: list[np.ndarray]) -> np.ndarray:
    longest = max(map(len, pictures))
    return np.stack([np.pad(each, (0, longest - len(each))) for each in pictures])


def stored(images: np.ndarray, kind: str):
    """Pictures as recorders of ALOHA store them."""
    if kind == "raw":
        return images
    if kind == "jpeg":
        return padded([jpeg(image) for image in images])
    rows = [jpeg(image) if kind == "rows" else np.frombuffer(png(image), np.uint8) for image in images]
    if kind == "rows":
        out = np.empty(len(rows), object)
        out[:] = rows
        return out
    return np.array([row.tobytes() for row in rows])  # text of bytes


def write_aloha(path: Path, seed: int, kind: str = "raw", width: int = 14, **attributes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images, state, actions = demonstration(seed, 5 + seed, width, width)
    with h5py.File(path, "w") as file:
        file.attrs.update({"sim": False} | attributes)
        file["action"] = actions.astype(np.float32)
        file["observations/qpos"], file["observations/qvel"] = state.astype(np.float32), 2 * state
        for camera, seen in (("cam_high", images), ("cam_left_wrist", images[:, ::-1])):
            values = stored(seen, kind)
            dtype = h5py.vlen_dtype(np.uint8) if kind == "rows" else values.dtype
            file.create_dataset(f"observations/images/{camera}", data=values, dtype=dtype)
        if kind == "jpeg":
            file["compress_len"] = np.zeros((2, len(images)))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Converts to the folder `out`, and gives the exit code, what was printed, and the errors."""
    monkeypatch.chdir(tmp_path)

    def run(source, *flags):
        code = cli.main(["data", "convert", str(source), "out", "--workers", "1", "--crf", "6", *flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_libero_has_its_cameras_state_words_and_rate(tmp_path, run, caplog):
    caplog.set_level("INFO")
    write_libero(tmp_path / "suite/b_demo.hdf5", (2, 3), LIBERO | ENVIRONMENT)
    write_libero(tmp_path / "suite/a_demo.hdf5", (0, 1))
    code, out, err = run("suite", "--rotate-180")
    assert code == 0, err
    assert "4 episodes, 22 frames, 20 per second" in out
    assert 'policy.robot="libero"' in out
    assert "left out, as neither pictures nor vectors: agentview_depth (float32[4, 48, 48, 1])" in caplog.text
    made = LeRobotDataset(tmp_path / "out")
    truth = [demonstration(seed, 4 + seed, 8, 7) for seed in range(4)]
    images, state, actions = (np.concatenate(parts) for parts in zip(*truth, strict=True))
    np.testing.assert_array_equal(made.columns("observation.state"), state.astype(np.float32))
    np.testing.assert_array_equal(made.columns("action"), actions.astype(np.float32))
    assert made.columns("observation.joint_states").shape == (22, 7)
    assert (made.tasks, made.fps, made.num_episodes) == (["open the drawer"], 20, 4)
    assert own_frame_is_nearest(all_frames(made, "observation.images.image"), images)
    assert own_frame_is_nearest(all_frames(made, "observation.images.image2"), images[:, :, ::-1])
    robot = get_robot("libero")  # finds everything without being told
    source = open_source(DatasetConfig("out"), DataConfig(frames="random"), robot)
    assert source.features["observation.state"]["names"] == list(robot.state)
    assert set(robot.cameras) <= set(source.cameras)


def test_a_dataset_that_needs_a_config_is_named(tmp_path, run):
    (tmp_path / "made/meta").mkdir(parents=True)
    (tmp_path / "made/meta/info.json").write_text("{}")
    code, _, err = run("made")
    assert code == 1
    assert "is a dataset already" in err
    assert cli.main(["data", "check", "made"]) == 1


def test_pictures_of_libero_that_stay_upside_down_are_said(tmp_path, caplog):
    write_libero(tmp_path / "a.hdf5")
    Hdf5Dataset(tmp_path / "a.hdf5", Hdf5Options())
    assert "--rotate-180 turns them" in caplog.text


def _turned(state):
    """A state whose quaternion is one."""
    return np.concatenate([state[:, :3], np.tile([0, 0, 0, 1], (len(state), 1)), state[:, 7:]], axis=1)


def test_robomimic_joins_its_usual_state_and_asks_for_words(tmp_path, run):
    write_robomimic(tmp_path / "a.hdf5")
    code, _, err = run("a.hdf5")
    assert code == 1
    assert "1 of 1 episodes of a.hdf5 have no instruction, such as a.hdf5 demo_0" in err
    assert '--prompt "fold the towel"' in err
    code, _, err = run("a.hdf5", "--prompt", "lift the cube")
    assert code == 0, err
    made, (images, state, actions) = LeRobotDataset(tmp_path / "out"), demonstration(3, 6, 9, 7)
    np.testing.assert_array_equal(made.columns("observation.state"), state.astype(np.float32))
    np.testing.assert_array_equal(made.columns("action"), actions.astype(np.float32))
    assert own_frame_is_nearest(all_frames(made, "observation.images.agentview_image"), images[:, :46, :44])
    assert (made.tasks, made.fps) == (["lift the cube"], 20)
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["robot_type"] == "panda"
    names = info["features"]["observation.state"]["names"]
    assert names[:4] == ["robot0_eef_pos_x", "robot0_eef_pos_y", "robot0_eef_pos_z", "robot0_eef_quat_x"]
    assert [each.pose for each in find_poses(names, _turned(state))] == [Pose(0, "quaternion_xyzw")]


@pytest.mark.parametrize("kind", ["raw", "jpeg", "rows", "text"])
def test_aloha_in_every_way_that_pictures_are_stored(tmp_path, run, kind):
    for number, seed in ((0, 0), (10, 2), (9, 1)):
        write_aloha(tmp_path / f"data/episode_{number}.hdf5", seed, kind)
    code, out, err = run("data", "--prompt", "pour")
    assert code == 0, err
    assert "3 episodes, 18 frames, 50 per second" in out
    made = LeRobotDataset(tmp_path / "out")
    images, state, actions = (
        np.concatenate(parts) for parts in zip(*(demonstration(s, 5 + s, 14, 14) for s in range(3)), strict=True)
    )
    np.testing.assert_array_equal(made.columns("observation.state"), state.astype(np.float32))
    np.testing.assert_array_equal(made.columns("observation.qvel"), (2 * state).astype(np.float32))
    np.testing.assert_array_equal(made.columns("action"), actions.astype(np.float32))
    assert own_frame_is_nearest(all_frames(made, "observation.images.cam_high"), images)
    assert own_frame_is_nearest(all_frames(made, "observation.images.cam_left_wrist"), images[:, ::-1])
    assert made.features["observation.state"]["names"] == list(get_robot("aloha").state)
    assert json.loads((tmp_path / "out/meta/info.json").read_text())["robot_type"] == "aloha"


def test_the_reader_gives_any_frames_in_any_process(tmp_path):
    for seed in (0, 1):
        write_aloha(tmp_path / f"{seed}.hdf5", seed, "raw")
    dataset = Hdf5Dataset(tmp_path, Hdf5Options(prompt="pour", bgr=True))
    images = np.concatenate([demonstration(seed, 5 + seed, 14, 14)[0] for seed in (0, 1)])
    rows = np.array([[10, 0], [4, 5]])
    again = pickle.loads(pickle.dumps(dataset))
    for each in (dataset, again):
        np.testing.assert_array_equal(each.images("observation.images.cam_high", rows), images[rows][..., ::-1])


def test_the_rate_is_asked_for_where_no_file_says_it(tmp_path, run):
    write_libero(tmp_path / "a.hdf5", attributes=LIBERO)
    code, _, err = run("a.hdf5")
    assert code == 1
    assert "do not say how many frames per second they have: --fps 30" in err
    code, out, err = run("a.hdf5", "--fps", "10", "--state", "joint_states + gripper_states")
    assert code == 0, err
    assert "10 per second" in out
    made = LeRobotDataset(tmp_path / "out")
    state = demonstration(0, 4, 8, 7)[1]
    np.testing.assert_array_equal(
        made.columns("observation.state")[:4], np.concatenate([state[:, :7] + 1, state[:, 6:]], 1).astype(np.float32)
    )


def test_demonstrations_of_one_fault_are_said_in_one_line(tmp_path, run):
    with h5py.File(tmp_path / "raw.hdf5", "w") as file:
        for number in range(30):
            file[f"data/demo_{number}/actions"] = np.zeros((3, 7))
    code, _, err = run("raw.hdf5")
    assert code == 1
    assert "raw.hdf5 data/demo_0, raw.hdf5 data/demo_1, " in err
    assert "and 10 more: has no observations; robomimic's dataset_states_to_obs.py makes them" in err
    with h5py.File(tmp_path / "raw.hdf5", "r+") as file:
        for number in range(30):
            for name in ("eef_pos", "joint_pos"):
                file[f"data/demo_{number}/obs/{name}"] = np.zeros((3, 3))
    code, _, err = run("raw.hdf5")
    assert code == 1
    assert "has ['eef_pos', 'joint_pos']; say which of them to take, such as --state 'eef_pos + joint_pos'" in err


def break_files(folder: Path) -> None:
    """One good file of ALOHA's, and each way in which another can be bad."""
    for seed in (0, 1):
        write_aloha(folder / f"good_{seed}.hdf5", seed)
    write_aloha(folder / "short.hdf5", 1)
    (folder / "short.hdf5").write_bytes((folder / "good_1.hdf5").read_bytes()[:3000])
    (folder / "pointer.hdf5").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    write_aloha(folder / "narrow.hdf5", 1, width=7)
    with h5py.File(folder / "other.hdf5", "w") as file:
        file["trajectory"] = np.zeros(3)
    write_aloha(folder / "uneven.hdf5", 1)
    with h5py.File(folder / "uneven.hdf5", "r+") as file:
        del file["action"]
        file["action"] = np.zeros((5, 14), np.float32)


REASONS = {
    "short.hdf5": "cannot be read as HDF5",
    "pointer.hdf5": "run `git lfs install` once",
    "narrow.hdf5": "has other features than good_0.hdf5: observation.qvel [7], observation.state [7], action [7]",
    "other.hdf5": "has neither data/demo_0",
    "uneven.hdf5": "has shape [6, 48, 48, 3]; the episode has 5 actions",
}


def test_every_file_that_cannot_be_converted_is_named_with_its_reason(tmp_path, run, caplog):
    break_files(tmp_path / "data")
    code, _, err = run("data", "--prompt", "pour")
    assert code == 1
    lines = {line.strip().partition(": ")[0]: line for line in err.splitlines() if ".hdf5: " in line}
    assert set(lines) == set(REASONS)
    assert all(reason in lines[name] for name, reason in REASONS.items()), err
    assert "--skip-bad-episodes leaves them out" in err
    code, out, err = run("data", "--prompt", "pour", "--skip-bad-episodes")
    assert code == 0, err
    assert "2 episodes, 11 frames" in out
    assert "skipped 5 of 7 episodes" in caplog.text


def test_a_damaged_picture_names_its_file_and_frame(tmp_path, run):
    write_aloha(tmp_path / "a.hdf5", 0, "jpeg")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        row = file["observations/images/cam_high"][3]
        row[len(row) // 3 :] = 0
        file["observations/images/cam_high"][3] = row
    code, _, err = run("a.hdf5", "--prompt", "pour")
    assert code == 1
    assert "a.hdf5 of a.hdf5: picture 3 of observations/images/cam_high cannot be decoded" in err
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_name_their_file(tmp_path, run):
    write_aloha(tmp_path / "data/a.hdf5", 0)
    with h5py.File(tmp_path / "data/a.hdf5", "r+") as file:
        file["observations/qvel"][2, 3] = np.nan
    code, _, err = run("data", "--prompt", "pour")
    assert code == 1
    assert "a.hdf5 of data: feature 'observation.qvel' holds NaN or infinity in frames [2]" in err


def test_an_existing_target_and_a_missing_source_are_said_at_once(tmp_path, run):
    (tmp_path / "out").mkdir()
    code, _, err = run("nowhere")
    assert code == 1
    assert "out exists. Choose another folder" in err
    (tmp_path / "out").rmdir()
    code, _, err = run("nowhere")
    assert code == 1
    assert "there is no nowhere; expected a Python file that sets `config`, or HDF5 files" in err


def test_a_stopped_conversion_goes_on_with_the_same_flags_only(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_aloha(tmp_path / f"{seed}.hdf5", seed)
    add, added = LeRobotWriter.add_episode, []

    def stop_at_the_second(self, frames, task):
        added.append(len(frames["action"]))
        if len(added) == 2:
            raise KeyboardInterrupt
        add(self, frames, task)

    def run(options):
        source = Hdf5Dataset(tmp_path, options)
        convert(source, tmp_path / "out", "aloha", workers=1, episodes_per_piece=1, settings=repr(options))

    monkeypatch.setattr(LeRobotWriter, "add_episode", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(Hdf5Options(prompt="pour"))
    with pytest.raises(ValueError, match="pieces of another conversion"):
        run(Hdf5Options(prompt="pour", bgr=True))
    run(Hdf5Options(prompt="pour"))
    assert added == [5, 6, 6]
    assert LeRobotDataset(tmp_path / "out").num_frames == 11


def test_flags_of_files_are_refused_for_a_config(tmp_path, run):
    (tmp_path / "config.py").write_text(
        "from pi0_jax.config import *\nconfig = TrainConfig(policy=PolicyConfig(robot='libero'))\n"
    )
    code, _, err = run("config.py", "--fps", "10")
    assert code == 1
    assert "--fps, --prompt and the like are for HDF5 files" in err


@pytest.mark.parametrize("words", ["ep_meta", "attribute", "dataset", "letters"])
def test_words_are_found_where_recorders_put_them(tmp_path, words):
    write_aloha(tmp_path / "a.hdf5", 0)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        if words == "ep_meta":
            file.attrs["ep_meta"] = json.dumps({"lang": "pour the tea"})
        elif words == "letters":
            file.attrs["problem_info"] = json.dumps({"language_instruction": [*'"pour the tea"']})
        elif words == "attribute":
            file.attrs["language_instruction"] = "pour the tea"
        else:
            file["language_raw"] = np.array([b"pour the tea"])
    assert Hdf5Dataset(tmp_path / "a.hdf5", Hdf5Options()).tasks == ["pour the tea"]


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.hdf5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[hdf5\]'"):
        Hdf5Dataset(tmp_path, Hdf5Options())
