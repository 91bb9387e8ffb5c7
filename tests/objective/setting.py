"""A tiny policy: an objective with small random parameters, a batch of three, and its compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.batch import Batch
from pi0_jax.config import Expert, ObjectiveConfig
from pi0_jax.pi0 import SampleOptions, loss, make_objective, sample_actions, sample_path
from pi0_jax.sampler import Euler
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.objective.cases import COMPACT, weights

HEADS = {"expert": Expert(), "compact": COMPACT}
SMALL = {"cameras": ("top",), "action_horizon": 3, "action_dim": 4, "prompt_length": 5}


class Setting:
    """What tests of sampling and losses share."""

    def __init__(self, config: ObjectiveConfig, **model):
        self.config = config
        self.model = tiny_config(**SMALL | model)
        self.objective = make_objective(config, self.model)
        self.params = weights(self.objective)
        batch = random_batch(self.model, 3, 1)
        lengths = np.arange(3, 6)[:, None]
        prompt_mask = np.arange(self.model.prompt_length) < lengths
        images = {name: image / jnp.float32(127.5) - 1 for name, image in batch.observation.images.items()}
        self.observation = batch.observation._replace(prompt_mask=prompt_mask, images=images)
        self.batch: Batch = jax.tree.map(jnp.asarray, batch._replace(observation=self.observation))
        self.observation = self.batch.observation
        self.noise = jax.random.normal(jax.random.key(2), self.batch.actions.shape)
        self.programs = {}
        self.losses = {}

    def sample(self, *, sampler=Euler(2), observation=None, noise=None, path=False, **options):
        """Actions, or the way to them; one program per choice of what is not an array."""
        observation = self.observation if observation is None else observation
        noise = self.noise if noise is None else noise
        arrays = {k: v for k, v in options.items() if k in ("guidance_scale", "previous", "keys", "features")}
        fixed = tuple((k, v) for k, v in options.items() if k not in arrays)
        run = self.programs.setdefault((sampler, path, fixed), jax.jit(self._program(sampler, path, dict(fixed))))
        return run(self.params, observation, noise, arrays)

    def _program(self, sampler, path, fixed):
        way = sample_path if path else sample_actions

        def run(params, observation, noise, arrays):
            return way(self.objective, params, observation, noise, SampleOptions(sampler, **fixed, **arrays))

        return run

    def loss(self, key: int = 0, step: int = 0, teacher=(), **changes) -> float:
        """The loss of the batch under a changed configuration of the same network."""
        which = (step, *sorted(changes.items()))
        if which not in self.losses:
            objective = make_objective(dataclasses.replace(self.config, **changes), self.model)
            self.losses[which] = jax.jit(
                lambda params, batch, key, *teacher: loss(objective, params, batch, key, step, *teacher)[0]
            )
        return float(self.losses[which](self.params, self.batch, jax.random.key(key), *teacher))
