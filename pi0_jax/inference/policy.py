"""A policy as a robot uses it: raw observations in, raw actions out. A checkpoint is all it needs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from pi0_jax import checkpoint, pi0
from pi0_jax.config import PolicyConfig
from pi0_jax.data.normalize import Stats, semantics_from_json, stats_from_json
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import Sample, check_observation, make_transform, to_observation
from pi0_jax.flow.guidance import Previous
from pi0_jax.model.heads import make_network


class Policy:
    """A trained network with the transforms around it.

    Args:
        config: model, robot, normalisation, and how to sample.
        params: the network's parameters.
        stats: normalisation statistics of the robot's demonstrations.
        tokenizer: the one that the weights were trained with.

    Raises:
        ValueError: statistics, tokenizer or cameras do not fit the robot or the model.
    """

    def __init__(self, config: PolicyConfig, params, stats: Stats, tokenizer: Tokenizer):
        pi0.check_policy(config)
        self.config = config
        self.robot: Robot = get_robot(config.robot)
        self._params = params
        self._transform = make_transform(config, self.robot, stats, tokenizer)
        self._network = make_network(config.model)

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Policy:
        """Reads a checkpoint: a run folder (its newest one), or a step folder.

        Args:
            path: where it is.
            changes: fields of `PolicyConfig` to set otherwise, such as `num_steps=4`.

        Raises:
            FileNotFoundError: no such path.
            ValueError: not a checkpoint of ours, or one that is damaged or incomplete; or statistics that do not fit.
        """
        assets = checkpoint.load_assets(path)
        if assets.norm_stats is None or assets.tokenizer is None:
            needed = (("norm_stats.json", assets.norm_stats), ("tokenizer.model", assets.tokenizer))
            missing = [name for name, value in needed if value is None]
            raise ValueError(
                f"{checkpoint.resolve(path)} holds weights but no {' and no '.join(missing)} in its assets/, so raw "
                "observations cannot be prepared for it. Fine-tune from it (--init-from), or add the files."
            )
        config = dataclasses.replace(assets.policy, **changes)
        semantics = config.action_semantics | semantics_from_json(assets.norm_stats)
        config = dataclasses.replace(config, action_semantics=semantics)
        network = make_network(config.model)
        like = nn.meta.unbox(jax.eval_shape(functools.partial(pi0.init_params, network), jax.random.key(0)))
        params = checkpoint.restore_params(path, like)
        return cls(config, params, stats_from_json(assets.norm_stats, config.robot), Tokenizer(assets.tokenizer))

    def infer(self, observation: dict[str, Any], seed: int = 0) -> Float[np.ndarray, "ah d"]:
        """One chunk of actions in the robot's units.

        Args:
            observation: `images` by camera (`[h, w, 3]` RGB, uint8 or float in [0, 1]), `state` `[d]` in the robot's
                units, and `prompt`, a string. With `previous`, what is left of the chunk in execution (`[n, d]`, the
                robot's units), and `delay`, how many of these will be executed before the new chunk is there, that one
                goes on from them, by `config.real_time`.
            seed: of the noise that becomes the actions.

        Raises:
            ValueError: the observation is not one of this robot's; the message says what is wrong.
        """
        return self.infer_batch([observation], jax.random.key(seed)[None])[0]

    def infer_batch(
        self,
        observations: Sequence[dict[str, Any]],
        keys: PRNGKeyArray,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Float[np.ndarray, "b ah d"]:
        """Chunks of actions for many observations in one call of the network.

        One program is compiled for each batch size and number of steps, at its first use; one more for guidance of
        whatever scale, and one more for observations with `previous`, however much that is.

        Args:
            observations: as in `infer`.
            keys: one for each observation's noise, so that a chunk does not depend on what else is in the batch.
            num_steps: solver steps; None: the config's.
            guidance_scale: of classifier-free guidance; None: the config's.
        """
        observation, anchors, previous = self._prepare(observations)
        options = self._options(num_steps, guidance_scale)
        actions = self._sample(self._params, observation, keys, previous=previous, **options)
        return self._raw(np.asarray(actions), anchors)

    def denoise(self, observation: dict[str, Any], seed: int = 0, num_steps: int | None = None) -> np.ndarray:
        """The points that noise passes on its way to a chunk, in the robot's units, `[num_steps + 1, ah, d]`."""
        keys = jax.random.key(seed)[None]
        prepared, anchors, _ = self._prepare([observation])
        _, points = self._sample(self._params, prepared, keys, **self._options(num_steps), path=True)
        return self._raw(np.asarray(points)[:, 0], anchors)

    def paths(
        self, observations: Sequence[dict[str, Any]], keys: PRNGKeyArray, num_steps: int | None = None
    ) -> Float[np.ndarray, "n b ah ad"]:
        """The points on the way of many chunks, as `flow.straightness` wants them: in the model's own units, at equally
        spaced times whatever the config's grid."""
        options = self._options(num_steps) | {"grid_power": 1.0}
        prepared, *_ = self._prepare(observations)
        _, points = self._sample(self._params, prepared, keys, **options, path=True)
        return np.asarray(points)

    def _options(self, num_steps: int | None, guidance_scale: float | None = None) -> dict[str, Any]:
        options = pi0.sampling_options(self.config)
        if num_steps is not None:
            options["num_steps"] = num_steps
        scale = options.pop("guidance_scale") if guidance_scale is None else guidance_scale
        return options | {"guidance_scale": None if scale == 1 else scale}

    def _prepare(self, observations: Sequence[dict[str, Any]]):
        """The model's observations; the states that relative actions refer to, if there are such; and what is left of
        the chunks in execution, if anything is."""
        samples = [self._transform.forward(check_observation(raw, self.robot)) for raw in observations]
        anchors = {key: np.stack([sample[key] for sample in samples]) for key in ("anchor",) if key in samples[0]}
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(to_observation, samples))
        return stacked, anchors, self._previous(samples)

    def _previous(self, samples: Sequence[Sample]) -> Previous | None:
        """The transforms made `actions` of what is left of a chunk, relative to the new state where they are relative.

        A trained network cannot be told of more certain actions than it learned with: only so many are."""
        if not any("actions" in sample for sample in samples):
            return None
        model, trained = self.config.model, self.config.real_time.method == "trained"
        actions = np.zeros((len(samples), model.action_horizon, model.action_dim), np.float32)
        delay, end = np.zeros((2, len(samples)), np.int32)
        for i, sample in enumerate(samples):
            left = sample.get("actions", actions[0, :0])[: model.action_horizon]
            actions[i, : len(left)], end[i] = left, len(left)
            delay[i] = min(sample.get("delay", 0), len(left), model.max_delay if trained else len(left))
        return Previous(*map(jnp.asarray, (actions, delay, end)))

    def _raw(self, actions: np.ndarray, anchors: dict[str, np.ndarray]) -> np.ndarray:
        return self._transform.inverse({"actions": actions} | anchors)["actions"].astype(np.float32)

    @functools.partial(
        jax.jit,
        static_argnums=0,
        static_argnames=("num_steps", "solver", "grid_power", "guidance_without", "clip", "path"),
    )
    def _sample(self, params, observation, keys, *, guidance_scale, **options):
        shape = (self.config.model.action_horizon, self.config.model.action_dim)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        scale = 1.0 if guidance_scale is None else guidance_scale
        return pi0.sample_actions(
            self._network, params, observation, noise, guidance_scale=scale, keys=keys,
            real_time=self.config.real_time, **options,
        )  # fmt: skip
