"""Several copies of a policy behind Ray Serve, for a fleet of robots (extra `ray`).

There is one server, with the connections, the authentication and the sessions; it sends batches to replicas, which are
stateless. So any replica may take any batch, and one that crashes is replaced; clients see a delay and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]

from pi0_jax import checkpoint
from pi0_jax.compilation import keep_programs
from pi0_jax.data.robot_json import kept_robot
from pi0_jax.inference.policy import Policy
from pi0_jax.inference.shapes import check_batch_sizes
from pi0_jax.serving.backend import Session
from pi0_jax.serving.robot_policy import RobotPolicy, ValidatedRequest, describe, remember, validate_request

log = logging.getLogger(__name__)


class Replica:
    """One copy of the policy, on its own devices, with `Fleet`'s options; it compiles before it accepts requests."""

    def __init__(self, run: Path, load: dict[str, Any], options: dict[str, Any]):
        keep_programs("default")
        self._served = RobotPolicy(Policy.load(run, **load), **options)
        self._seconds = self._served.warm_up()

    def seconds(self) -> dict[int, float]:
        """Seconds by batch size, measured at the start."""
        return self._seconds

    def infer_batch(
        self, observations: Sequence[ValidatedRequest], sessions: Sequence[Session]
    ) -> list[dict[str, Any]]:
        """As `PolicyBackend.infer_batch`; its changes to these copies of the sessions are lost."""
        return self._served.infer_batch(observations, sessions)


class Fleet:
    """A policy backend that computes in replicas. It starts them, in the Ray cluster that RAY_ADDRESS names or else in
    a cluster of this machine alone, and returns when they have compiled.

    Args:
        run: run folder or checkpoint, readable by all machines of the cluster.
        replicas: number of replicas.
        gpus: GPUs per replica.
        load, options: of `Policy.load` and `RobotPolicy`.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be used.
    """

    def __init__(self, run: Path, replicas: int, gpus: float = 0.0, *, load: dict[str, Any], options: dict[str, Any]):
        assets = checkpoint.load_assets(run)
        every = load.get("subtask_every")
        config = assets.policy if every is None else dataclasses.replace(assets.policy, subtask_every=every)
        self.robot, self._options = kept_robot(config.robot, assets.robot), options
        self.config, self.parallel, self.batch_sizes = config, replicas, check_batch_sizes(options["batch_sizes"])
        self.metadata = describe(config, self.robot, options.get("real_time", False))
        # A cluster of our own listens on this machine alone, since Ray's ports have no token.
        own: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"_node_ip_address": "127.0.0.1"}
        ray.init(include_dashboard=False, log_to_driver=False, ignore_reinit_error=True, **own)
        serve.start(http_options={"location": "NoServer"})  # our own server accepts the requests
        deployment = serve.deployment(
            num_replicas=replicas, max_ongoing_requests=1, ray_actor_options={"num_gpus": gpus, "num_cpus": 1}
        )(Replica)
        log.info("starting %d replicas", replicas)
        self._handle = serve.run(deployment.bind(Path(run).absolute(), load, options), name="pi0", route_prefix=None)

    def warm_up(self) -> dict[int, float]:
        """Seconds by batch size of a replica; replicas have compiled before they accept requests."""
        return self._handle.seconds.remote().result()

    def validate(self, request: Any) -> ValidatedRequest:
        """As `PolicyBackend.validate`."""
        prompt, real_time = self._options.get("prompt"), self._options.get("real_time", False)
        return validate_request(request, self.robot, self.config, prompt, real_time)

    def infer_batch(
        self, observations: Sequence[ValidatedRequest], sessions: Sequence[Session]
    ) -> list[dict[str, Any]]:
        """As `PolicyBackend.infer_batch`, on a free replica; on another one if that replica crashes."""
        try:
            answers = self._handle.infer_batch.remote(observations, sessions).result()
        except RayActorError as error:
            log.warning("a replica crashed (%s); another one computes its batch", error)
            answers = self._handle.infer_batch.remote(observations, sessions).result()
        for session, answer in zip(sessions, answers, strict=True):
            remember(session, answer, self.config.subtask_every)
        return answers

    def close(self) -> None:
        """Stops the replicas."""
        serve.shutdown()
        ray.shutdown()
