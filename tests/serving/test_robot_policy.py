"""A checkpoint behind the server: formats of clients, batches, and the command."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import signal
import socket
import sys
import threading

import jax
import numpy as np
import pytest

from pi0_client.client import Client, ServerError
from pi0_jax import cli
from pi0_jax.data.observation import check_observation
from pi0_jax.data.robots import get_robot
from pi0_jax.inference.policy import Policy
from pi0_jax.serving import logs
from pi0_jax.serving.backend import Session
from pi0_jax.serving.client_formats import read_request, read_seed
from pi0_jax.serving.robot_policy import RobotPolicy, describe_for_roboarena, noise_keys
from tests.serving.fake import command, serving

RNG = np.random.default_rng(0)
IMAGE, WRIST = (RNG.integers(0, 256, (12, 16, 3), np.uint8) for _ in range(2))


@pytest.fixture(scope="module")
def policy(checkpoint_folder):
    return Policy.load(checkpoint_folder)


@pytest.fixture(scope="module")
def server(policy):
    with serving(RobotPolicy(policy, (1, 4)), window_ms=200.0) as server:
        yield server


def observation(n: int = 0) -> dict:
    rng = np.random.default_rng(n)
    images = {camera: rng.integers(0, 256, (48, 48, 3), np.uint8) for camera in ("top", "tool")}
    return {"images": images, "state": rng.normal(size=6) / 10, "prompt": "reach the red block"}


def test_a_seeded_chunk_over_the_network_is_the_one_in_this_process(server, policy):
    with Client(server.uri) as client:
        assert client.metadata["actions"] == ["dx", "dy", "dz"]
        chunk = client.infer(observation(), seed=7)["actions"]
        np.testing.assert_array_equal(chunk, policy.infer(observation(), seed=7))
        words = np.asarray(jax.random.key_data(jax.random.key(7)))
        np.testing.assert_array_equal(client.infer(observation(), seed=words)["actions"], chunk)


def test_batched_answers_of_sessions_are_those_of_a_client_alone(server):
    def drive(n: int, parties: threading.Barrier) -> np.ndarray:
        chunks = []
        with Client(server.uri) as client:
            for i in range(3):
                parties.wait(60.0)  # all ask at once, however slowly they connected
                chunks.append(client.infer(observation(10 * n + i))["actions"])
        return np.stack(chunks)

    four, alone = threading.Barrier(4), threading.Barrier(1)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda n: drive(n, four), range(4)))
    assert server.metrics.batch_sizes[4]
    for n, chunks in enumerate(together):
        np.testing.assert_allclose(chunks, drive(n, alone), atol=1e-5)
    assert np.abs(together[0][0] - together[1][0]).max() > 1e-3


def test_once_it_is_ready_nothing_compiles(checkpoint_folder):
    compiled = []
    served = RobotPolicy(Policy.load(checkpoint_folder), (2,), real_time=True)
    served.warm_up()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        sessions = [Session("a"), Session("b")]
        changes = [{}, {"executed": 2}, {"seed": 3}, {"previous": np.zeros((2, 3)), "delay": 1}]
        changes.append({"prompt": "push the blue ball onto the yellow circle"})
        requests = [served.validate(observation(i) | change) for i, change in enumerate(changes)]
        for first, second in itertools.product(requests, requests):
            served.infer_batch([first, second], sessions)
            served.infer_batch([first], sessions[:1])
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "compile" in name]


def test_each_request_of_a_session_gets_its_own_noise():
    keys = noise_keys([Session("a"), Session("b"), Session("a", 1), (3,), (0, 3)], base=3)
    words = np.asarray(jax.random.key_data(keys))
    np.testing.assert_array_equal(words[0], words[1])
    np.testing.assert_array_equal(words[3], words[4])
    assert len({tuple(row) for row in words}) == 3


def test_errors_say_what_is_wrong_with_an_observation(server):
    with Client(server.uri) as client:
        with pytest.raises(ServerError, match=r"lacks cameras \['tool'\]"):
            client.infer(observation() | {"images": {"top": IMAGE}})
        sent = {"observation/image": IMAGE, "observation/state": np.zeros(6, np.float32), "prompt": "push"}
        with pytest.raises(ServerError, match=r"no picture of tabletop's cameras; it has \['observation/image'"):
            client.infer(sent)
        with pytest.raises(ServerError, match="NaN or infinite in"):
            client.infer(observation() | {"state": np.full(6, np.nan)})
        with pytest.raises(ServerError, match=r"lacks \['prompt'\]"):
            client.infer({k: v for k, v in observation().items() if k != "prompt"})
        with pytest.raises(ServerError, match="`seed` came as -1"):
            client.infer(observation(), seed=-1)


@pytest.mark.parametrize(
    ("robot", "request_", "images", "state"),
    [
        (
            "libero",
            {"observation/image": IMAGE, "observation/wrist_image": WRIST, "observation/state": np.arange(8.0)},
            {"base_0_rgb": IMAGE, "left_wrist_0_rgb": WRIST},
            np.arange(8.0),
        ),
        (
            "droid",
            {
                "observation/exterior_image_1_left": IMAGE,
                "observation/wrist_image_left": np.moveaxis(WRIST, -1, 0),
                "observation/joint_position": np.arange(7.0),
                "observation/gripper_position": 7.0,
                "session_id": "x",
            },
            {"base_0_rgb": IMAGE, "left_wrist_0_rgb": WRIST},
            np.arange(8.0),
        ),
        (
            "aloha",
            {
                "images": {
                    name: np.moveaxis(IMAGE, -1, 0)
                    for name in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
                },
                "state": np.arange(14.0),
            },
            {name: IMAGE for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")},
            np.arange(14.0),
        ),
        (
            "tabletop",
            {"observation.images.top": IMAGE, "observation.images.tool": WRIST, "observation.state": np.arange(6.0)},
            {"top": IMAGE, "tool": WRIST},
            np.arange(6.0),
        ),
    ],
)
def test_formats_of_openpis_clients_are_accepted(robot, request_, images, state):
    robot = get_robot(robot)
    for prompt in ("pick it up", b"pick it up", np.array("pick it up")):
        checked = check_observation(read_request(request_ | {"prompt": prompt}, robot), robot)
        assert checked["prompt"] == "pick it up"
    assert set(checked["images"]) == set(images)
    for name, image in images.items():
        np.testing.assert_array_equal(checked["images"][name], image)
    np.testing.assert_array_equal(checked["state"], state.astype(np.float32))
    assert read_request(request_, robot, "default")["prompt"] == "default"


def test_malformed_requests_are_refused():
    robot = get_robot("tabletop")
    for request, message in (
        ([1], "came as list"),
        ({"images": 3, "state": 1}, "`images` came as int"),
        ({"prompt": "x"}, "lacks the state"),
        ({"images": {}, "state": 1, "prompt": "x" * 20_000}, "20000 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            read_request(request, robot)
    for seed in (1.5, True, "x", [1, 2, 3], -1, 2**32, np.zeros((1, 1), int), [[1], [2, 3]]):
        with pytest.raises(ValueError, match="`seed` came as"):
            read_seed({"seed": seed})


def test_roboarenas_metadata_are_for_droid_alone(policy):
    with pytest.raises(ValueError, match="this policy is for 'tabletop'"):
        describe_for_roboarena(policy.config, policy.robot)


def test_the_command_logs_json_and_ends_with_0_on_sigterm(checkpoint_folder, tmp_path):
    with (
        command(checkpoint_folder, tmp_path / "log", "--log", "json", "--batch-sizes", "1") as (uri, process),
        Client(uri) as client,
    ):
        assert client.infer(observation())["actions"].shape == (6, 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    messages = [json.loads(line)["message"] for line in lines if line.startswith("{")]
    assert any(text.startswith("program 1 of 1 (batch of 1, prompt of 24 tokens): compiled after") for text in messages)
    assert messages[-1] == "stopped"


def test_the_command_refuses_a_network_without_a_token_before_loading(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PI0_TOKEN", raising=False)
    assert cli.main(["serve", str(tmp_path / "none"), "--host", "0.0.0.0"]) == 1
    assert "everybody in the network" in capsys.readouterr().err
    monkeypatch.setenv("PI0_TOKEN", "short")
    assert cli.main(["serve", str(tmp_path / "none"), "--host", "0.0.0.0"]) == 1
    assert "at least 16" in capsys.readouterr().err
    assert os.environ["PI0_TOKEN"] == "short"


def test_the_command_names_what_is_missing_before_loading(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PI0_TOKEN", raising=False)
    monkeypatch.setattr(logs, "set_up", lambda form: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(tmp_path / "none"), "--port", port]) == 1
    assert f"port {port}: Address already in use. Choose another --port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vla_eval", None)
    monkeypatch.delitem(sys.modules, "pi0_jax.serving.vla_eval", raising=False)
    for name in [name for name in sys.modules if name.startswith("vla_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["serve", str(tmp_path / "none"), "--port", "0", "--protocol", "vla-eval"]) == 1
    assert "pip install -e '.[vla-eval]'" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "pi0 serve runs/tabletop --host 0.0.0.0 --token-file" in capsys.readouterr().out


def test_a_session_continues_the_chunk_in_execution(policy):
    with serving(RobotPolicy(policy, (1,), real_time=True)) as server, Client(server.uri) as client:
        first = client.infer(observation(), seed=1)["actions"]
        by_server = client.infer(observation(1) | {"executed": 2, "delay": 1}, seed=2)["actions"]
        by_client = client.infer(observation(1) | {"previous": first[2:], "delay": 1}, seed=2)["actions"]
        np.testing.assert_array_equal(by_server, by_client)
        np.testing.assert_array_equal(
            by_server, policy.infer(observation(1) | {"previous": first[2:], "delay": 1}, seed=2)
        )
        assert np.abs(by_server - client.infer(observation(1), seed=2)["actions"]).max() > 1e-4
        for delay in (np.zeros(3), float("inf"), "x", -1):
            with pytest.raises(ServerError, match=r"invalid: .*delay"):
                client.infer(observation() | {"executed": 2, "delay": delay})
        thin = observation() | {"images": observation()["images"] | {"top": np.zeros((2000, 3, 3), np.uint8)}}
        assert np.isfinite(client.infer(thin)["actions"]).all()
        with pytest.raises(ServerError, match=r"`previous` has shape \(7,\)"):
            client.infer(observation() | {"executed": 2, "previous": np.zeros(7)})
        with pytest.raises(ServerError, match="`executed` came as -1"):
            client.infer(observation() | {"executed": -1})
    plain = RobotPolicy(policy, (1,))
    with pytest.raises(ValueError, match="need a server with --real-time"):
        plain.validate(observation() | {"executed": 2})
