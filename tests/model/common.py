"""Random parameters, those that start at zero too, and random observations."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig


def random_params(network, rng: np.random.Generator):
    """Parameters of the network's shapes; nothing is compiled."""
    shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0)))

    def leaf(shape: jax.ShapeDtypeStruct):
        return jnp.asarray(rng.normal(size=shape.shape) / max(shape.shape[-1], 8) ** 0.5, jnp.float32)

    return jax.tree.map(leaf, shapes)


def random_observation(config: ModelConfig, batch: int, rng: np.random.Generator) -> Observation:
    """All cameras present; prompts of three tokens and up."""
    size = config.vision.image_size
    return Observation(
        images={name: jnp.asarray(rng.uniform(-1, 1, (batch, size, size, 3)), jnp.float32) for name in config.cameras},
        image_masks={name: jnp.ones(batch, bool) for name in config.cameras},
        state=jnp.asarray(rng.normal(size=(batch, config.action_dim)), jnp.float32),
        prompt=jnp.asarray(rng.integers(1, config.vocab_size, (batch, config.prompt_length)), jnp.int32),
        prompt_mask=jnp.arange(config.prompt_length)[None] < jnp.arange(3, 3 + batch)[:, None],
    )
