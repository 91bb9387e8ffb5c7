"""The policy as a model server of vla-eval, the harness of many simulated benchmarks (extra `vla-eval`).

Its protocol is another one than openpi's, and its own server speaks it; this is the model behind that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from anyio.to_thread import run_sync
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, RAW, ROTATION_AA, DimSpec

from pi0_jax.serving.backend import RobotPolicy
from pi0_jax.serving.session import Session


class Pi0ModelServer(PredictModelServer):
    """One action for each observation of an episode, out of chunks that are computed when they run out.

    Args:
        served: the policy; it is compiled here.
        chunk_size: actions of a chunk that are executed; None: the checkpoint's own number.
        options: the base class's.
    """

    def __init__(self, served: RobotPolicy, chunk_size: int | None = None, **options: Any):
        executed = chunk_size or served.policy.config.execute_steps
        super().__init__(chunk_size=executed, max_batch_size=served.batch_sizes[-1], **options)
        self._served = served
        self._sessions: dict[str, Session] = {}
        served.warm_up()

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_start(config, ctx)
        self._sessions[ctx.session_id] = Session(ctx.session_id)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_end(result, ctx)
        self._sessions.pop(ctx.session_id, None)

    def get_action_spec(self) -> dict[str, DimSpec]:
        if self._served.policy.robot.name == "libero":
            return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}
        return {"actions": RAW}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {"image": IMAGE_RGB, "state": RAW, "language": LANGUAGE}

    def get_observation_params(self) -> dict[str, Any]:
        return {"send_wrist_image": len(self._served.policy.robot.cameras) > 1, "send_state": True}

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Checks an observation before it joins a batch, so that its fault is not the others'.

        Raises:
            ValueError: it is not this robot's; the harness tells its client so.
        """
        prepared = await run_sync(self._served.prepare, self._request(obs))
        await super().on_observation({"prepared": prepared}, ctx)

    def predict_batch(self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]) -> list[dict[str, Any]]:
        """Chunks for checked observations of several sessions.

        Raises:
            RuntimeError: actions were not finite; none of them is sent.
        """
        most = self._served.batch_sizes[-1]  # the harness's page for settings lets anybody ask for more
        if len(obs_batch) > most:
            rest = self.predict_batch(obs_batch[most:], ctx_batch[most:])
            return self.predict_batch(obs_batch[:most], ctx_batch[:most]) + rest
        sessions = [self._sessions.setdefault(ctx.session_id, Session(ctx.session_id)) for ctx in ctx_batch]
        answers = self._served.infer_batch([observation["prepared"] for observation in obs_batch], sessions)
        for session, answer in zip(sessions, answers, strict=True):
            if not np.isfinite(answer["actions"]).all():
                raise RuntimeError("the policy's actions were not finite. They are not sent; hold still.")
            session.answered += 1
        return [{"actions": answer["actions"]} for answer in answers]

    def _request(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The harness's observation in our words: cameras by their names, or else in the robot's order."""
        cameras = list(self._served.policy.robot.cameras.values())
        images = dict(observation.get("images", {}))
        if not set(images) <= set(cameras):
            images = dict(zip(cameras, images.values(), strict=False))
        state = observation.get("states", observation.get("state"))
        request = {"images": images, "prompt": observation.get("task_description", "")}
        return request | ({} if state is None else {"state": state})
