"""The arrays that travel between rooms, and the letters that name their axes.

Axis letters, in annotations and (upper case) in einsum strings:

    b batch · t query length · s key length · n query heads · k key/value heads · g queries per key/value head
    h head dim · d width · l layers · ah action horizon · ad action dim · p prompt length · c target length

All containers are NamedTuples, so that any tree operation may put shapes, shardings or axes in their place.
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


class Targets(NamedTuple):
    """What the language expert learns to write after the prompt: text, such as the subtask, then action tokens."""

    tokens: Int[Array, "*b c"]
    """Ids of the backbone's vocabulary; padding is at the end."""
    mask: Bool[Array, "*b c"]
    """False at padding."""
    loss_mask: Bool[Array, "*b c"]
    """True at tokens that are learnt; False at those that are only given, such as a BOS."""
    is_action: Bool[Array, "*b c"]
    """True at action tokens: marker, codes, `|` and EOS, which the flow expert never sees."""


class Batch(NamedTuple):
    """Training examples."""

    observation: Observation
    actions: Float[Array, "*b ah ad"]
    """Normalised and zero-padded action chunks."""
    step_mask: Bool[Array, "*b ah"]
    """False for steps after the episode's end."""
    dim_mask: Bool[Array, "*b ad"]
    """False for dimensions that the robot does not have."""
    targets: Targets | None = None
    """What is learnt as tokens; None: nothing, as for a flow alone."""
    has_actions: Bool[Array, "*b"] | None = None
    """False for examples without actions, such as an image with a question and its answer; None: all have some."""


class CodecTables(NamedTuple):
    """A FAST codec (arXiv 2501.09747; `data.fast`) as arrays, with which a compiled program writes action tokens and
    turns them into actions."""

    code_bytes: UInt8[Array, "codes m"]
    """UTF-8 bytes that each code stands for, zeros behind them. A character is a coefficient, U+0000 `min_token`."""
    num_bytes: Int[Array, "codes"]
    """Bytes of each code."""
    min_token: Int[Array, ""]
    """Rounded coefficient that U+0000 stands for."""
    max_token: Int[Array, ""]
    """Largest rounded coefficient that the codec was made for."""
    scale: Float[Array, ""]
    """Rounded coefficients are this many times the cosine transform's."""
    dims: Int[Array, ""]
    """Action dimensions that have coefficients, the first ones of the model's: those of the robot."""
    marker: Int[Array, "k"]
    """Ids of the backbone's vocabulary that come before the codes: "Action: ", and with `Fast.bos` a BOS before it."""
    bar: Int[Array, ""]
    """Id of `|`, which comes after the codes."""
    eos: Int[Array, ""]
    """Id of the end of a sequence."""


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


def example_batch(model: ModelConfig, batch_size: int, target_length: int = 0) -> Batch:
    """Zeros in the shapes that a network is trained on, as the loader makes them.

    Args:
        model: whose shapes.
        batch_size: number of examples.
        target_length: tokens to be learnt (`ObjectiveConfig.target_length`); 0: there are none.
    """
    observation, steps = example_observation(model, batch_size), (batch_size, model.action_horizon)
    images = {name: image.astype(jnp.uint8) for name, image in observation.images.items()}
    dims = (batch_size, model.action_dim)
    targets = None
    if target_length:
        every = jnp.ones((batch_size, target_length), bool)
        targets = Targets(every.astype(jnp.int32), every, every, every)
    chunks = jnp.zeros((*steps, dims[1])), jnp.ones(steps, bool), jnp.ones(dims, bool)
    return Batch(observation._replace(images=images), *chunks, targets)


def example_codec(codes: int = 1024, longest: int = 16, dims: int = 1) -> CodecTables:
    """Tables in the shapes that a program decodes action tokens with.

    Args:
        codes: how many there are.
        longest: bytes of the longest code.
        dims: action dimensions of the robot.
    """
    one = jnp.int32(1)
    table, counts = jnp.zeros((codes, longest), jnp.uint8), jnp.ones(codes, jnp.int32)
    return CodecTables(table, counts, -one, one, jnp.float32(10), dims * one, jnp.ones(3, jnp.int32), one, one)
