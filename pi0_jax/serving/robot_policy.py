"""A checkpoint's policy as the server's backend."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.config import PolicyConfig
from pi0_jax.data.observation import check_observation
from pi0_jax.data.robots import RawObservation, Robot
from pi0_jax.errors import UserError
from pi0_jax.inference.policy import Policy
from pi0_jax.inference.prepare import check_subtask
from pi0_jax.inference.shapes import check_batch_sizes
from pi0_jax.serving.backend import Session
from pi0_jax.serving.client_formats import read_executed, read_request, read_seed

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ValidatedRequest:
    """A request that was checked."""

    observation: RawObservation
    seed: tuple[int, ...] | None
    executed: int | None
    """Executed actions of the session's last chunk, where the new chunk is to continue its remaining ones."""


def validate_request(
    request: Any, robot: Robot, config: PolicyConfig, prompt: str | None = None, real_time: bool = False
) -> ValidatedRequest:
    """Checks a decoded frame that should come from `robot` for a policy; UserError says how the request is at fault.

    `prompt` is the instruction for requests without one; `real_time` says whether they may include what remains of the
    chunk in execution.
    """
    raw, executed = read_request(request, robot, prompt), read_executed(request)
    to_check = raw
    if executed is not None and raw.get("previous") is None:  # so that `delay` is checked
        to_check = raw | {"previous": np.zeros((1, len(robot.actions)))}
    checked: dict[str, Any] = {**check_observation(to_check, robot)}
    check_subtask(checked.get("text", ""), config)
    observation = cast(RawObservation, raw | {key: checked[key] for key in ("images", "state", "prompt")})
    if not real_time and ("previous" in raw or executed is not None):
        raise UserError("`previous` and `executed` need a server with --real-time, which compiles what they take.")
    return ValidatedRequest(observation, read_seed(request), executed)


class RobotPolicy:
    """A checkpoint's policy behind the server.

    The noise of a session's n-th request is a function of `seed` and n, so that a client's answers are those it would
    get alone.

    Args:
        batch_sizes: numbers of requests to compile a program for.
        prompt: instruction for clients that send none.
        seed: noise seed of sessions that do not send their own.
        real_time: compile programs for chunks that continue the one in execution, and accept such requests.
    """

    parallel = 1

    def __init__(
        self,
        policy: Policy,
        batch_sizes: Sequence[int] = (1, 2, 4, 8),
        prompt: str | None = None,
        seed: int = 0,
        real_time: bool = False,
    ):
        self.policy, self.prompt, self.seed, self.real_time = policy, prompt, seed, real_time
        self.config, self.robot, self.batch_sizes = policy.config, policy.robot, check_batch_sizes(batch_sizes)
        self.metadata = describe(policy.config, policy.robot, real_time)

    def warm_up(self) -> dict[int, float]:
        """Compiles programs for each batch size and length of prompts; returns seconds by batch size."""
        for size in self.batch_sizes:
            noise_keys([(0,)] * size, self.seed)
        return self.policy.warm_up(self.batch_sizes, real_time=self.real_time)

    def validate(self, request: Any) -> ValidatedRequest:
        """Checks a decoded request; raises as `PolicyBackend.validate` does."""
        return validate_request(request, self.policy.robot, self.config, self.prompt, self.real_time)

    def infer_batch(
        self, observations: Sequence[ValidatedRequest], sessions: Sequence[Session]
    ) -> list[dict[str, Any]]:
        """Chunks in the robot's units; `infer_ms` is the batch's time from observations to actions in host memory."""
        start = time.perf_counter()
        count = len(observations)
        size = next(n for n in self.batch_sizes if n >= count)
        rows = list(range(count)) + [0] * (size - count)
        requests = list(zip(observations, sessions, strict=True))
        seeds = [request.seed or session for request, session in requests]
        keys = noise_keys([seeds[i] for i in rows], self.seed)
        raw = [_with_memory(request, session) for request, session in requests]
        chunks, texts = self.policy.answer_batch([raw[i] for i in rows], keys)
        timing = {"infer_ms": 1000 * (time.perf_counter() - start), "batch_size": count}
        answers = []
        for chunk, text, session in zip(chunks, texts, sessions, strict=False):
            answer = {"actions": np.asarray(chunk, np.float32), "policy_timing": timing}
            answers.append(answer if text is None else answer | {"subtask": text})
            remember(session, answers[-1], self.config.subtask_every)
        return answers


def _with_memory(request: ValidatedRequest, session: Session) -> RawObservation:
    """The observation, with what remains of the session's last chunk if the new one is to continue it, and with its
    subtask while that holds."""
    observation: dict[str, Any] = {**request.observation}
    if request.executed is not None and session.memory is not None:
        observation["previous"] = session.memory[request.executed :]
    if session.subtask is not None and session.subtask[1]:
        observation = {"subtask": session.subtask[0], **observation}
    return cast(RawObservation, observation)


def remember(session: Session, answer: dict[str, Any], subtask_every: int) -> None:
    """Keeps a chunk in its session, and the subtask with the number of chunks for which it still holds."""
    session.memory, text = answer["actions"], answer.get("subtask")
    if text is None:
        return
    left = session.subtask[1] if session.subtask else 0
    if not left:
        log.info("subtask: %s", text, extra={"session": session.name})
    session.subtask = text, (left or max(subtask_every, 1)) - 1


def noise_keys(seeds: Sequence[tuple[int, ...] | Session], base: int) -> jax.Array:
    """Noise keys: of a seed, of a key's two words, or of a session's next request under the server's seed `base`."""
    rows = [(0, base, s.answered) if isinstance(s, Session) else (len(s), *s, 0)[:3] for s in seeds]
    table = np.array(rows, np.uint32)
    return _noise_keys(table[:, 0], table[:, 1:])


@jax.jit
@jax.vmap
def _noise_keys(kind, words):
    key = jax.random.key(words[0])
    return jnp.stack([jax.random.fold_in(key, words[1]), key, jax.random.wrap_key_data(words)])[kind]


def describe(config: PolicyConfig, robot: Robot, real_time: bool = False) -> dict[str, Any]:
    """A policy's metadata for clients: its robot, what to send and what comes back."""
    metadata = {
        "robot": robot.name,
        "cameras": [camera for camera in robot.cameras.values() if camera in config.model.cameras],
        "image_size": config.model.vision.image_size,
        "state": list(robot.state),
        "actions": list(robot.actions),
        "action_horizon": config.model.action_horizon,
        "execute_steps": config.execute_steps,
        "num_steps": getattr(config.sampler, "num_steps", None),
        "fps": robot.fps,
        "real_time": real_time,
    }
    return metadata | ({"reset_pose": list(robot.clients.reset_pose)} if robot.clients.reset_pose else {})


def describe_for_roboarena(config: PolicyConfig, robot: Robot) -> dict[str, Any]:
    """The metadata in RoboArena's words; its clients allow no others. UserError if the robot is not RoboArena's."""
    space = robot.clients.action_space
    if space is None:
        raise UserError(f"RoboArena's robots are DROID's; this policy is for {robot.name!r}.")
    size = config.model.vision.image_size
    return {
        "image_resolution": [size, size],
        "needs_wrist_camera": True,
        "n_external_cameras": 1,
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": space,
    }
