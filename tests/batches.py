"""Batches of random numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.batch import Batch, Observation, Targets
from pi0_jax.config import ModelConfig


def random_batch(config: ModelConfig, size: int, seed: int = 0, target_length: int = 0) -> Batch:
    """Examples of a model; with targets of that length, a third of them text, the last ones padding."""
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
        random_targets(random, size, target_length, config.vocab_size) if target_length else None,
    )
    return jax.tree.map(jnp.asarray, batch)


def random_targets(random: np.random.Generator, size: int, length: int, vocab_size: int) -> Targets:
    place = np.arange(length)[None]
    ends, text = random.integers(length // 2, length + 1, (size, 1)), random.integers(0, length // 3 + 1, (size, 1))
    mask = place < ends
    tokens = np.where(mask, random.integers(1, vocab_size, (size, length)), 0).astype(np.int32)
    return Targets(tokens, mask, mask & (place > 0), mask & (place >= text))
