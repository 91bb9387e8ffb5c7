"""The arrays that travel between rooms, and the letters that name their axes.

Axis letters, in annotations and (upper case) in einsum strings:

    b batch · t query length · s key length · n query heads · k key/value heads · g queries per key/value head
    h head dim · d width · l layers · ah action horizon · ad action dim · p prompt length

Both containers are NamedTuples, so that any tree operation may put shapes, shardings or axes in their place.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from pi0_jax.config import ModelConfig


class Observation(NamedTuple):
    """What the policy sees at one moment. Order of cameras is `ModelConfig.cameras`, never the dict's."""

    images: dict[str, Float[Array, "*b h w 3"] | UInt8[Array, "*b h w 3"]]
    """RGB; uint8 in 0..255 or float in [-1, 1]."""
    image_masks: dict[str, Bool[Array, "*b"]]
    """False where the camera is absent: its tokens are neither attended nor counted in positions."""
    state: Float[Array, "*b ad"]
    """Normalised and zero-padded proprioception."""
    prompt: Int[Array, "*b p"]
    """Token ids."""
    prompt_mask: Bool[Array, "*b p"]
    """False at padding."""


class Batch(NamedTuple):
    """Training examples."""

    observation: Observation
    actions: Float[Array, "*b ah ad"]
    """Normalised and zero-padded action chunks."""
    step_mask: Bool[Array, "*b ah"]
    """False for steps after the episode's end."""
    dim_mask: Bool[Array, "*b ad"]
    """False for dimensions that the robot does not have."""


def scale_images(observation: Observation) -> Observation:
    """uint8 images to float32 in [-1, 1]; float images pass unchanged."""
    images = {
        name: image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if image.dtype == jnp.uint8 else image
        for name, image in observation.images.items()
    }
    return observation._replace(images=images)


def example_observation(model: ModelConfig, batch_size: int) -> Observation:
    """Zeros in the shapes that a network takes."""
    size = model.vision.image_size
    return Observation(
        images={name: jnp.zeros((batch_size, size, size, 3)) for name in model.cameras},
        image_masks={name: jnp.ones(batch_size, bool) for name in model.cameras},
        state=jnp.zeros((batch_size, model.action_dim)),
        prompt=jnp.zeros((batch_size, model.prompt_length), jnp.int32),
        prompt_mask=jnp.ones((batch_size, model.prompt_length), bool),
    )


def example_batch(model: ModelConfig, batch_size: int) -> Batch:
    """Zeros in the shapes that a network is trained on, as the loader makes them."""
    observation, steps = example_observation(model, batch_size), (batch_size, model.action_horizon)
    images = {name: image.astype(jnp.uint8) for name, image in observation.images.items()}
    dims = (batch_size, model.action_dim)
    return Batch(
        observation._replace(images=images), jnp.zeros((*steps, dims[1])), jnp.ones(steps, bool), jnp.ones(dims, bool)
    )
