"""The policy as a model for the server of vla-eval, the harness of many simulated benchmarks (extra `vla-eval`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from anyio.to_thread import run_sync
from vla_eval import specs
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec

from pi0_jax.serving.backend import Session
from pi0_jax.serving.robot_policy import RobotPolicy


class Pi0ModelServer(PredictModelServer):
    """One action per observation of an episode, from chunks that are computed when they run out.

    `chunk_size` of a chunk are executed, by default the checkpoint's own number; `options` are those of the base class.
    """

    def __init__(self, backend: RobotPolicy, chunk_size: int | None = None, **options: Any):
        executed = chunk_size or backend.policy.config.execute_steps
        super().__init__(chunk_size=executed, max_batch_size=backend.batch_sizes[-1], **options)
        self._backend = backend
        self._sessions: dict[str, Session] = {}
        backend.warm_up()

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_start(config, ctx)
        self._sessions[ctx.session_id] = Session(ctx.session_id)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_end(result, ctx)
        self._sessions.pop(ctx.session_id, None)

    def get_action_spec(self) -> dict[str, DimSpec]:
        groups = self._backend.policy.robot.clients.action_spec or {"actions": "RAW"}
        return {name: getattr(specs, spec) for name, spec in groups.items()}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {"image": IMAGE_RGB, "state": RAW, "language": LANGUAGE}

    def get_observation_params(self) -> dict[str, Any]:
        return {"send_wrist_image": len(self._backend.policy.robot.cameras) > 1, "send_state": True}

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Checks an observation before it joins a batch, which isolates failures; its client gets the error."""
        validated = await run_sync(self._backend.validate, self._request(obs))
        await super().on_observation({"validated": validated}, ctx)

    def predict_batch(self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]) -> list[dict[str, Any]]:
        """Chunks for validated observations; RuntimeError, and no answers, if any actions are not finite."""
        most = self._backend.batch_sizes[-1]  # the harness's settings page lets anybody ask for more
        if len(obs_batch) > most:
            later = self.predict_batch(obs_batch[most:], ctx_batch[most:])
            return self.predict_batch(obs_batch[:most], ctx_batch[:most]) + later
        sessions = [self._sessions.setdefault(ctx.session_id, Session(ctx.session_id)) for ctx in ctx_batch]
        answers = self._backend.infer_batch([observation["validated"] for observation in obs_batch], sessions)
        for session, answer in zip(sessions, answers, strict=True):
            if not np.isfinite(answer["actions"]).all():
                raise RuntimeError("the policy's actions were not finite. They are not sent; hold still.")
            session.answered += 1
        return [{"actions": answer["actions"]} for answer in answers]

    def _request(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The harness's observation as a request: cameras by their names, or else in the robot's order."""
        cameras = list(self._backend.policy.robot.cameras.values())
        images = dict(observation.get("images", {}))
        if not set(images) <= set(cameras):
            images = dict(zip(cameras, images.values(), strict=False))
        state = observation.get("states", observation.get("state"))
        request = {"images": images, "prompt": observation.get("task_description", "")}
        return request | ({} if state is None else {"state": state})
