"""Several copies of a policy behind Ray Serve, for a fleet of robots (extra `ray`).

The server stays one: it has the connections, the guards and what sessions remember, and hands batches to replicas,
which remember nothing. So any replica may take any batch, and one that dies is replaced without a client's noticing
more than a delay.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]

from pi0_jax import checkpoint
from pi0_jax.data.robots import get_robot
from pi0_jax.inference.policy import Policy, check_batch_sizes
from pi0_jax.serving.backend import Prepared, RobotPolicy, check_request, describe
from pi0_jax.serving.session import Session

log = logging.getLogger(__name__)


class Replica:
    """One copy of the policy, on its own devices; it compiles before it takes anything.

    Args:
        run: as of `Fleet`.
        load: options of `Policy.load`.
        options: `RobotPolicy`'s.
    """

    def __init__(self, run: Path, load: dict[str, Any], options: dict[str, Any]):
        self._served = RobotPolicy(Policy.load(run, **load), **options)
        self._served.warm_up()

    def infer_batch(self, observations: Sequence[Prepared], sessions: Sequence[Session]) -> list[dict[str, Any]]:
        """As `Served.infer_batch`; what it notes in these copies of sessions is lost."""
        return self._served.infer_batch(observations, sessions)


class Fleet:
    """A policy as the server calls it, that has replicas compute. It starts them, in the Ray cluster that RAY_ADDRESS
    names or else in one of this machine's own, and returns when they have compiled.

    Args:
        run: run folder or checkpoint, which all machines of the cluster can read.
        replicas: how many.
        gpus: of each.
        load: options of `Policy.load`.
        options: `RobotPolicy`'s.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be used.
    """

    def __init__(self, run: Path, replicas: int, gpus: float = 0.0, *, load: dict[str, Any], options: dict[str, Any]):
        config = checkpoint.load_assets(run).policy
        self._robot, self._options = get_robot(config.robot), options
        self.config, self.parallel, self.batch_sizes = config, replicas, check_batch_sizes(options["batch_sizes"])
        self.metadata = describe(config, options.get("real_time", False))
        # A cluster of our own is for this machine alone, as Ray's ports know no token.
        own: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"_node_ip_address": "127.0.0.1"}
        ray.init(include_dashboard=False, log_to_driver=False, ignore_reinit_error=True, **own)
        serve.start(http_options={"location": "NoServer"})  # the way in is our own server
        deployment = serve.deployment(
            num_replicas=replicas, max_ongoing_requests=1, ray_actor_options={"num_gpus": gpus, "num_cpus": 1}
        )(Replica)
        log.info("starting %d replicas", replicas)
        self._handle = serve.run(deployment.bind(Path(run).absolute(), load, options), name="pi0", route_prefix=None)

    def warm_up(self) -> None:
        """Does nothing: replicas are compiled when they are there."""

    def prepare(self, request: Any) -> Prepared:
        """As `Served.prepare`."""
        return check_request(request, self._robot, self._options.get("prompt"), self._options.get("real_time", False))

    def infer_batch(self, observations: Sequence[Prepared], sessions: Sequence[Session]) -> list[dict[str, Any]]:
        """As `Served.infer_batch`, of a replica that is free; another one if it dies of it."""
        try:
            answers = self._handle.infer_batch.remote(observations, sessions).result()
        except RayActorError as error:
            log.warning("a replica died (%s); another one takes its batch", error)
            answers = self._handle.infer_batch.remote(observations, sessions).result()
        for session, answer in zip(sessions, answers, strict=True):
            session.memory = answer["actions"]
        return answers

    def close(self) -> None:
        """Ends the replicas."""
        serve.shutdown()
        ray.shutdown()
