"""Environments in processes of this interpreter, and of one that has neither JAX nor this package."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import venv
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from pi0_jax.data.lerobot import LeRobotDataset
from pi0_jax.data.robots import get_robot
from pi0_jax.errors import UserError
from pi0_jax.evaluate import environments, messages
from pi0_jax.evaluate.commands import Evaluate, evaluate
from pi0_jax.evaluate.demonstrate import Noise, demonstrate
from pi0_jax.evaluate.environments import install, open_simulator
from pi0_jax.evaluate.gl import gl_advice
from pi0_jax.evaluate.processes import Processes
from pi0_jax.evaluate.record import INTERVENTION, SUCCESS, Rollouts
from pi0_jax.evaluate.rollout import roll_out
from pi0_jax.evaluate.simulators import get_simulator
from tests.evaluate.simulators.test_gym import LINE

pytest.importorskip("gymnasium", reason="the simulator is not installed: pip install -e '.[sim]'")
CAMERAS = {"observation.images.top": "top"}


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("simulator") / "line.py"
    path.write_text(LINE)
    return str(path)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> str:
    """An interpreter that has numpy and Gymnasium, and no package that this one has besides."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in ("numpy", "gymnasium", "farama_notifications", "cloudpickle", "typing_extensions"):
        module = sys.modules.get(name) or __import__(name)
        file = os.path.dirname(module.__file__) if hasattr(module, "__path__") else module.__file__
        (site / os.path.basename(file)).symlink_to(file)
    libraries = os.path.dirname(np.__file__) + ".libs"
    (site / "numpy.libs").symlink_to(libraries)
    return str(folder / "bin" / "python")


def test_messages_arrive_as_they_were_sent():
    pipe = tempfile.TemporaryFile()  # noqa: SIM115
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1]
    sent = {"images": {"top": image}, "state": np.float64(0.5), "flags": (True, None), "none": np.empty((0, 3)), "n": 7}
    messages.send(pipe, sent)
    messages.send(pipe, np.array(3, np.int16))
    pipe.seek(0)
    came = messages.receive(pipe)
    np.testing.assert_array_equal(came["images"]["top"], image)
    assert (came["state"], came["flags"], came["none"].shape, came["n"]) == (0.5, [True, None], (0, 3), 7)
    assert messages.receive(pipe) == np.int16(3)
    with pytest.raises(EOFError):
        messages.receive(pipe)


def test_episodes_and_demonstrations_are_the_same_here_and_in_a_strangers_process(line, stranger, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = subprocess.run([stranger, "-c", "import jax"], capture_output=True, text=True)
    assert "No module named 'jax'" in found.stderr
    here, there = get_simulator(line), Processes(line, {}, stranger, most=2)
    assert (there.name, there.robot, there.fps, there.tasks, there.per_task) == ("line", "tabletop", 5, here.tasks, 3)
    for index in range(2):
        episodes = [each.start(index, 3) for each in (here, there)]
        assert len({(episode.task, episode.seed) for episode in episodes}) == 1
        over = False
        while not over:
            one, other = (episode.observe() for episode in episodes)
            np.testing.assert_array_equal(one["state"], other["state"])
            np.testing.assert_array_equal(one["images"]["top"], other["images"]["top"])
            np.testing.assert_array_equal(*(episode.picture() for episode in episodes))
            (over, won), (ended, succeeded) = (episode.step(np.array([0.3, 0, 0])) for episode in episodes)
            assert (over, won) == (ended, succeeded)
        for episode in episodes:
            episode.close()
    noise = Noise(0.3)
    for number, demonstration in enumerate(there.demonstrations(3, 1, "train", noise, CAMERAS)):
        expected = demonstrate(here, number, 1, "train", noise, CAMERAS)
        assert demonstration[1:] == expected[1:]
        for name, values in expected.frames.items():
            np.testing.assert_array_equal(demonstration.frames[name], values)
    there.close()


def test_an_evaluation_in_processes_has_the_same_outcomes_and_resumes(line, checkpoint_folder, tmp_path, capsys):
    for threads in ("true", "false"):
        options = (f"threads={threads}",)
        how = {"env": line, "env_options": options, "num_steps": 1, "output": tmp_path / threads}
        how["record"] = tmp_path / f"record_{threads}"
        evaluate(Evaluate(checkpoint_folder, **how, episodes=3, videos="failures"))
    there, here = ((tmp_path / name / "line.jsonl").read_text().splitlines() for name in ("false", "true"))
    assert there[1:] == here[1:]
    rows = {row["index"]: row for row in map(json.loads, there[1:])}
    assert {row["task"] for row in rows.values()} == {"up", "down"}
    failures = sum(not row["success"] for row in rows.values())
    assert len([*(tmp_path / "false").rglob("*failure.mp4")]) == len([*(tmp_path / "false").rglob("*.mp4")]) == failures

    check_recording(tmp_path / "record_true", rows)
    assert "3 episodes recorded" in capsys.readouterr().out

    file = tmp_path / "true" / "line.jsonl"
    file.write_text("\n".join(here[:2]) + '\n{"index": 1, "ta')  # as if interrupted while it was written
    how = {"env": line, "env_options": ("threads=true",), "num_steps": 1, "output": tmp_path / "true"}
    evaluate(Evaluate(checkpoint_folder, **how, resume=True, videos="none"))
    again = file.read_text().splitlines()
    assert sorted(again[1:4]) == sorted(here[1:4])
    assert len(again) == 7  # the protocol has three episodes of two tasks
    assert "of 6" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed 0 there and 1 now"):
        evaluate(Evaluate(checkpoint_folder, **how, resume=True, seed=1))
    with pytest.raises(UserError, match="--record takes the episodes of one evaluation from its beginning"):
        evaluate(Evaluate(checkpoint_folder, **how, resume=True, record=tmp_path / "new"))
    with pytest.raises(FileExistsError, match=r"record_true exists.*--overwrite"):
        evaluate(Evaluate(checkpoint_folder, **how, record=tmp_path / "record_true"))


class Pusher:
    """Stands for a policy: it goes up."""

    robot, config = get_robot("tabletop"), SimpleNamespace(execute_steps=2)

    def infer_batch(self, observations, keys, num_steps=None):
        return np.full((len(observations), 4, 3), [0.3, 0, 0], np.float32)


@pytest.mark.parametrize("threads", [True, False])
def test_a_policys_successes_and_failures_are_recorded(line, threads, tmp_path):
    simulator = open_simulator(line, {"threads": threads}, most=2)
    with Rollouts(tmp_path / "rollouts", simulator, {"policy": "pusher"}) as rollouts:
        how = {"record": rollouts.robot.cameras, "keep": lambda outcome: rollouts.add(outcome) or outcome}
        outcomes = roll_out(Pusher(), simulator, 4, batch_size=3, **how).outcomes
    assert [outcome.success for outcome in outcomes] == [True, False, True, False]
    check_recording(tmp_path / "rollouts", {outcome.index: dataclasses.asdict(outcome) for outcome in outcomes})


def check_recording(root, outcomes):
    """A policy's episodes are in the dataset as they went, and marked."""
    dataset, story = LeRobotDataset(root), json.loads((root / "meta/recording.json").read_text())
    assert {row["index"]: row["success"] for row in story["episodes"]} == {i: x["success"] for i, x in outcomes.items()}
    labels = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")["episode_success"].to_pylist()
    columns = {name: dataset.columns(name)[:, 0] for name in ("observation.state", "action", SUCCESS, INTERVENTION)}
    assert not columns[INTERVENTION].any()
    begin = 0
    for row, label in zip(story["episodes"], labels, strict=True):
        end = begin + outcomes[row["index"]]["num_steps"]
        place, action, success = (columns[name][begin:end] for name in ("observation.state", "action", SUCCESS))
        np.testing.assert_allclose(np.diff(place), action[:-1], atol=1e-6)
        assert success.tolist() == [False] * (end - begin - 1) + [row["success"]]
        assert label == ("success" if row["success"] else "failure")
        assert dataset.task(begin) == outcomes[row["index"]]["prompt"]
        begin = end
    assert begin == dataset.num_frames


def test_a_camera_that_draws_nothing_stops_the_run_with_its_name(line):
    episode = Processes(line, {"blind": True}, most=1).start(0, 0)
    with pytest.raises(UserError, match="camera 'top' of the simulator line draws nothing: each pixel is 0"):
        episode.observe()


def test_what_goes_wrong_in_a_process_is_said(line, tmp_path):
    with pytest.raises(UserError, match=r"interpreter /no/python cannot be run"):
        Processes(line, {}, "/no/python")
    with pytest.raises(UserError, match="no option 'lenght'"):
        Processes(line, {"lenght": 1})
    path = tmp_path / "broken.py"
    path.write_text(LINE.replace("self.steps == 8", "1 / 0"))
    episode = Processes(str(path), {}, most=1).start(0, 0)
    with pytest.raises(UserError, match=r"ZeroDivisionError: (?s:.*)broken.py"):
        episode.step(np.zeros(3))
    path.write_text(LINE.replace("self.steps == 8", "__import__('os')._exit(7)"))
    episode = Processes(str(path), {}, most=1).start(0, 0)
    with pytest.raises(UserError, match="process of the simulator broken ended with code 7"):
        episode.step(np.zeros(3))


def test_an_error_of_drawing_names_the_package():
    egl = "AttributeError: 'NoneType' object has no attribute 'eglQueryString'"
    assert "apt install libegl1 libegl-mesa0 libgl1-mesa-dri" in gl_advice(egl)
    assert not gl_advice("ZeroDivisionError: division by zero")


def test_packages_of_its_own_are_installed_in_the_cache_and_found(tmp_path, monkeypatch, line):
    path = tmp_path / "apart.py"
    path.write_text(LINE + "\nPACKAGES = ('no-such-simulator==1.0',)\n")
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"apart.py needs no-such-simulator==1.0. To install it .* pi0 env install"):
        open_simulator(str(path))
    commands = []

    def run(command, check):
        commands.append(command)
        (tmp_path / "cache/envs/apart/bin").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environments.subprocess, "run", run)
    python = install(str(path))
    assert commands[1] == [str(python), "-m", "pip", "install", "no-such-simulator==1.0"]
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = open_simulator(str(path))
    assert found.tasks == ("up", "down")
    with pytest.raises(UserError, match="names no packages"):
        install(line)
