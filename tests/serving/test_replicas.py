"""Replicas behind Ray Serve, in a cluster of this machine's own."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

from pi0_client.client import Client
from pi0_jax.inference.policy import Policy
from pi0_jax.serving.robot_policy import RobotPolicy
from tests.serving.fake import command, serving
from tests.serving.test_robot_policy import observation


def drive(uri: str, n: int) -> np.ndarray:
    """Chunks that a client with a robot of its own gets; from the second on they go on from the last."""
    with Client(uri) as client:
        chunks = [client.infer(observation(10 * n))["actions"]]
        return np.stack(chunks + [client.infer(observation(10 * n + i) | {"executed": 2})["actions"] for i in (1, 2)])


def test_replicas_give_the_answers_of_one_policy(checkpoint_folder, tmp_path):
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install -e '.[ray]'")
    flags = ("--replicas", "2", "--batch-sizes", "1", "2", "--real-time")
    with (
        command(checkpoint_folder, tmp_path / "log", *flags) as (uri, _),
        concurrent.futures.ThreadPoolExecutor(6) as threads,
    ):
        by_replicas = list(threads.map(lambda n: drive(uri, n), range(6)))
    with serving(RobotPolicy(Policy.load(checkpoint_folder), (1,), real_time=True)) as server:
        for n, chunks in enumerate(by_replicas):
            np.testing.assert_allclose(chunks, drive(server.uri, n), atol=1e-5)
