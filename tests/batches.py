"""Batches of random numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import ModelConfig


def random_batch(config: ModelConfig, size: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    pixels = config.vision.image_size
    observation = Observation(
        images={c: random.integers(0, 256, (size, pixels, pixels, 3), np.uint8) for c in config.cameras},
        image_masks={c: np.ones(size, bool) for c in config.cameras},
        state=random.standard_normal((size, config.action_dim), np.float32),
        prompt=random.integers(0, config.vocab_size, (size, config.prompt_length), np.int32),
        prompt_mask=np.ones((size, config.prompt_length), bool),
    )
    batch = Batch(
        observation,
        random.standard_normal((size, config.action_horizon, config.action_dim), np.float32),
        np.arange(config.action_horizon) < random.integers(1, config.action_horizon + 1, (size, 1)),
        np.ones((size, config.action_dim), bool),
    )
    return jax.tree.map(jnp.asarray, batch)
