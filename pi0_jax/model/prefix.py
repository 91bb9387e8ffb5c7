"""What all heads share: an observation's images and prompt as tokens, and the backbone that reads them."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig
from pi0_jax.model.gemma import Backbone
from pi0_jax.model.norm import named
from pi0_jax.model.siglip import ImageEncoder, dense


class PrefixNetwork(nn.Module):
    """Image encoder, token embedding and backbone. A head is a subclass that adds its own parts in `setup_head`.

    Each head has `prefill(observation)`, for all that depends on neither the noisy chunk nor the time, and methods that
    run the rest against what that returned.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.image_encoder = ImageEncoder(c.vision, self.dtype, c.remat, c.attention)
        self.image_projector = dense(c.language.width, ("embed", "embed_out"), self.dtype, "image_projector")
        self.embedding = self.param(
            "embedding",
            named(nn.initializers.normal(c.language.width**-0.5), ("vocab", "embed")),
            (c.vocab_size, c.language.width),
            jnp.float32,
        )
        self.backbone = Backbone(c)
        self.setup_head()

    def setup_head(self):
        """Makes the head's own submodules."""

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def embed_prefix(self, observation: Observation) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Image tokens in the order of `config.cameras`, then prompt tokens; and which of them are valid.

        All cameras go through the encoder as one batch.

        Raises:
            ValueError: the observation lacks a camera of the config.
        """
        c = self.config
        missing = [name for name in c.cameras if name not in observation.images]
        if missing:
            raise ValueError(
                f"the observation lacks cameras {missing}; it has {sorted(observation.images)}. "
                "Rename them in the robot, mask them with `image_masks`, or leave them out of `ModelConfig.cameras`."
            )
        tokens, masks = [], []
        if c.cameras:
            encoded = self.image_encoder(jnp.concatenate([observation.images[name] for name in c.cameras]))
            for name, image in zip(c.cameras, jnp.split(self.image_projector(encoded), len(c.cameras)), strict=True):
                tokens.append(image)
                masks.append(jnp.broadcast_to(observation.image_masks[name][:, None], image.shape[:2]))
        prompt = self.embedding[observation.prompt]
        tokens.append((prompt * jnp.sqrt(c.language.width).astype(prompt.dtype)).astype(self.dtype))
        masks.append(observation.prompt_mask)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)
