"""Clients of other projects, unmodified, against our servers.

openpi's and inspect-robots' run in an interpreter of their own, which PI0_CLIENTS_PYTHON names. To make one:

    python -m venv clients && clients/bin/pip install --no-deps openpi-client==0.1.2
    clients/bin/pip install msgpack 'websockets<18' dm-tree pillow numpy typing-extensions inspect-robots-franka
    PI0_CLIENTS_PYTHON=clients/bin/python python -m pytest tests/serving/test_clients.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

from pi0_client.msgpack_numpy import pack, unpack
from pi0_jax.data.normalization import NormStats, stats_to_json
from pi0_jax.inference.policy import Policy
from pi0_jax.serving.backend import Session
from pi0_jax.serving.robot_policy import RobotPolicy, describe_for_roboarena
from tests.conftest import tiny_config
from tests.policies import TINY, save_tiny_checkpoint
from tests.serving.fake import command, serving

PYTHON = os.environ.get("PI0_CLIENTS_PYTHON", sys.executable)
PROGRAMS = Path(__file__).parent / "clients"


@functools.cache
def has(package: str) -> bool:
    """Whether the clients' interpreter has a package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([PYTHON, "-c", code]).returncode == 0


def run_client(program: str, package: str, *arguments: object) -> str:
    """What a program of theirs printed; skips where its package is not installed."""
    if not has(package):
        pytest.skip(f"{package} is not installed in {PYTHON}; set PI0_CLIENTS_PYTHON, see the top of this file")
    line = [PYTHON, str(PROGRAMS / program), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def policy(checkpoint_folder):
    return Policy.load(checkpoint_folder)


@pytest.fixture(scope="module")
def droid(tmp_path_factory):
    """A policy for DROID's velocities with random weights."""
    model = tiny_config(cameras=("base_0_rgb", "left_wrist_0_rgb"), action_dim=8, vocab_size=512, prompt_length=24)
    config = dataclasses.replace(TINY, model=model, robot="droid_velocity")
    stats = NormStats(*np.array([[0.0] * 8, [0.5] * 8, [-1.0] * 8, [1.0] * 8, [-1.5] * 8, [1.5] * 8]))
    stats = stats_to_json({"state": stats, "actions": stats})
    return Policy.load(save_tiny_checkpoint(tmp_path_factory.mktemp("droid"), policy=config, norm_stats=stats))


def requests(count: int) -> dict[str, np.ndarray]:
    """Observations of the tabletop in columns, as openpi's clients name things."""
    rng = np.random.default_rng(0)
    images = {f"observation/{name}": rng.integers(0, 256, (count, 48, 48, 3), np.uint8) for name in ("top", "tool")}
    seeds = np.arange(count)
    return images | {
        "observation/state": rng.normal(size=(count, 6)) / 10,
        "prompt": ["reach it"] * count,
        "seed": seeds,
    }


def test_openpis_client_gets_the_chunks_of_this_process(policy, tmp_path):
    columns = requests(4)
    np.savez(tmp_path / "requests.npz", **columns)
    with serving(RobotPolicy(policy, (1,))) as server:
        files = (tmp_path / "requests.npz", tmp_path / "answers.npy")
        result = json.loads(run_client("openpi.py", "openpi_client", server.uri, *files))
    assert result["metadata"]["actions"] == ["dx", "dy", "dz"]
    assert result["timing"] == ["infer_ms", "prev_total_ms", "wait_ms"]
    assert "lacks the state" in result["error"]
    assert "Traceback" not in result["error"]
    for i, chunk in enumerate(np.load(tmp_path / "answers.npy")):
        images = {name: columns[f"observation/{name}"][i] for name in ("top", "tool")}
        observation = {"images": images, "state": columns["observation/state"][i], "prompt": "reach it"}
        np.testing.assert_array_equal(chunk, policy.infer(observation, seed=i))


def test_inspect_robots_franka_acts_by_a_droid_policy(droid, tmp_path):
    received = []

    class Heard(RobotPolicy):
        def validate(self, request):
            received.append(super().validate(request))
            return received[-1]

    with serving(served := Heard(droid, (1,))) as server:
        received.clear()
        run_client("franka.py", "inspect_robots_franka", server.uri.rpartition(":")[2], tmp_path / "answer.npy")
    (asked,) = received
    assert asked.observation["prompt"] == "put the marker into the cup"
    assert asked.observation["images"]["base_0_rgb"].shape == (224, 224, 3)
    state = np.linspace(-0.5, 0.5, 8)
    np.testing.assert_allclose(asked.observation["state"], [*state[:7], 1 - state[7]], atol=1e-6)
    (ours,) = served.infer_batch([asked], [Session("alone")])
    chunk = ours["actions"].astype(np.float64)
    joints = state[:7] + 0.2 * np.cumsum(np.clip(chunk[:, :7], -1, 1), axis=0)  # as it makes positions of velocities
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), np.hstack([joints, 1 - chunk[:, 7:]]))


def test_roboarenas_protocol_works(droid):
    served = RobotPolicy(droid, (1,))
    served.metadata = describe_for_roboarena(droid.config, droid.robot)
    rng = np.random.default_rng(1)
    names = ("observation/exterior_image_0_left", "observation/exterior_image_1_left", "observation/wrist_image_left")
    frame = {name: rng.integers(0, 256, (16, 16, 3), np.uint8) for name in names[1:]}
    frame |= {"observation/joint_position": np.zeros(7), "observation/gripper_position": np.zeros(1)}
    frame |= {"prompt": "pick it up", "session_id": "4d2e"}
    with serving(served) as server, connect(server.uri, compression=None, max_size=None) as connection:
        assert unpack(connection.recv()) == {
            "image_resolution": [16, 16],
            "needs_wrist_camera": True,
            "n_external_cameras": 1,
            "needs_stereo_camera": False,
            "needs_session_id": False,
            "action_space": "joint_velocity",
        }
        chunks = []
        for _ in range(2):
            for _ in range(2):
                connection.send(pack(frame | {"endpoint": "infer"}))
                chunks.append(unpack(connection.recv())["actions"])
            connection.send(pack(frame | {"endpoint": "reset"}))
            assert connection.recv() == "reset successful"
    assert chunks[0].shape == (6, 8)
    np.testing.assert_array_equal(chunks[:2], chunks[2:])
    assert np.abs(chunks[0] - chunks[1]).max() > 1e-3


def vla_eval_observation(n: int) -> dict:
    rng = np.random.default_rng(n)
    images = {name: rng.integers(0, 256, (48, 48, 3), np.uint8) for name in ("agentview", "wrist")}
    return {"images": images, "states": rng.normal(size=6) / 10, "task_description": "reach the red block"}


def test_vla_evals_connection_gets_the_actions_of_batched_chunks(policy):
    anyio = pytest.importorskip("anyio")
    pytest.importorskip("vla_eval", reason="vla-eval is not installed: pip install -e '.[vla-eval]'")
    from vla_eval.connection import Connection
    from vla_eval.model_servers.serve import serve_async

    from pi0_jax.serving.vla_eval import Pi0ModelServer

    server = Pi0ModelServer(RobotPolicy(policy, (1, 2)), chunk_size=3)
    actions: dict[int, list[np.ndarray]] = {}

    async def episode(port: int, n: int) -> None:
        async with Connection(f"ws://127.0.0.1:{port}", max_retries=1) as connection:
            assert connection.server_info["observation_params"] == {"send_wrist_image": True, "send_state": True}
            await connection.start_episode({"task": {"name": "reach"}})
            with pytest.raises(RuntimeError, match=r"lacks the state"):
                await connection.act({"images": {}, "task_description": "x"})
            actions[n] = [(await connection.act(vla_eval_observation(n)))["actions"] for _ in range(4)]
            await connection.end_episode({"success": True})

    async def run() -> None:
        async with anyio.create_task_group() as group:
            port = await group.start(serve_async, server, "127.0.0.1", 0)
            async with anyio.create_task_group() as episodes:
                for n in range(3):
                    episodes.start_soon(episode, port, n)
            group.cancel_scope.cancel()

    anyio.run(run)
    assert not server._sessions
    served = RobotPolicy(policy, (1,))
    for n, taken in actions.items():
        session = Session("alone")
        observation = served.validate(server._request(vla_eval_observation(n)))
        (first,) = served.infer_batch([observation], [session])
        session.answered += 1
        (second,) = served.infer_batch([observation], [session])
        expected = [*first["actions"][:3], second["actions"][0]]
        np.testing.assert_allclose(taken, expected, atol=1e-5)


def test_vla_eval_gets_finite_actions_only_and_large_batches_are_divided(policy):
    pytest.importorskip("vla_eval", reason="vla-eval is not installed: pip install -e '.[vla-eval]'")
    from vla_eval.model_servers.base import SessionContext

    from pi0_jax.serving.vla_eval import Pi0ModelServer

    served = RobotPolicy(policy, (1, 2))
    server = Pi0ModelServer(served)
    contexts = [SessionContext(str(i), "episode", "sync") for i in range(5)]
    requests = [{"validated": served.validate(server._request(vla_eval_observation(i)))} for i in range(5)]
    assert len(server.predict_batch(requests, contexts)) == 5
    served.infer_batch = lambda observations, sessions: [{"actions": np.full((6, 3), np.nan)}] * len(sessions)
    with pytest.raises(RuntimeError, match="not finite"):
        server.predict_batch(requests, contexts)


def test_the_command_serves_vla_eval_and_ends_on_sigterm(checkpoint_folder, tmp_path):
    anyio = pytest.importorskip("anyio")
    pytest.importorskip("vla_eval", reason="vla-eval is not installed: pip install -e '.[vla-eval]'")
    from vla_eval.connection import Connection

    async def ask(uri: str) -> np.ndarray:
        async with Connection(uri, max_retries=1) as connection:
            await connection.start_episode({"task": {}})
            return (await connection.act(vla_eval_observation(0)))["actions"]

    with command(checkpoint_folder, tmp_path / "log", "--protocol", "vla-eval", "--batch-sizes", "1") as (uri, _):
        assert anyio.run(ask, uri).shape == (3,)
