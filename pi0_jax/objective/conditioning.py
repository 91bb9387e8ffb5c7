"""Observations as conditions: masked for classifier-free guidance, and as features for couplings."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from pi0_jax.batch import Observation
from pi0_jax.config.objective import Condition, ConditionDropout
from pi0_jax.errors import UserError
from pi0_jax.flow.coupling import Coupling

CONDITIONS: Sequence[Condition] = ("prompt", "images", "both")


def without(observation: Observation, condition: Condition, where: Bool[Array, "b"] | bool = True) -> Observation:
    """The observation with the prompt, the images, or both masked, in the examples where `where` is True."""
    keep = jnp.broadcast_to(jnp.logical_not(jnp.asarray(where)), observation.prompt_mask.shape[:-1])
    if condition in ("images", "both"):
        masks = {name: mask & keep for name, mask in observation.image_masks.items()}
        observation = observation._replace(image_masks=masks)
    if condition in ("prompt", "both"):
        observation = observation._replace(prompt_mask=observation.prompt_mask & keep[..., None])
    return observation


def drop(observation: Observation, draw: Float[Array, "b"], config: ConditionDropout) -> Observation:
    """Masks prompt, images or both of some examples, each with its own probability.

    Args:
        observation: to be masked.
        draw: per example, uniform in [0, 1).
        config: the probabilities.
    """
    if config == ConditionDropout():
        return observation
    bounds = jnp.cumsum(jnp.array([getattr(config, condition) for condition in CONDITIONS]))
    low = 0.0
    for condition, high in zip(CONDITIONS, bounds, strict=True):
        observation = without(observation, condition, (draw >= low) & (draw < high))
        low = high
    return observation


def check_dropout(config: ConditionDropout) -> None:
    """Raises UserError for what are no probabilities."""
    for condition in CONDITIONS:
        if not 0 <= getattr(config, condition) <= 1:
            raise UserError(
                f"objective.dropout.{condition} is {getattr(config, condition)}; it is a probability, between 0 and 1."
            )
    if config.prompt + config.images + config.both > 1:
        raise UserError("objective.dropout: an example drops the prompt, the images or both; their sum is above 1.")


def coupled_noise(
    coupling: Coupling,
    noise: Float[Array, "b s ah ad"],
    actions: Float[Array, "b ah ad"],
    observation: Observation,
    key: Key[Array, ""],
) -> Float[Array, "b s ah ad"]:
    """The noise of each draw in the order that the coupling gives it, charging for a change of observation."""
    condition = condition_features(observation)
    keys = jax.random.split(key, noise.shape[1])
    couple = jax.vmap(lambda row, key: coupling.couple(row, actions, condition, key), in_axes=(1, 0), out_axes=1)
    return couple(noise, keys)


def condition_features(observation: Observation) -> Float[Array, "b c"]:
    """An observation as numbers whose squared distances tell observations apart, for couplings.

    State, which tokens the prompt has, and each image averaged over an 8 x 8 grid; another prompt, or a change of one
    in the state or throughout an image, counts about one or more.
    """
    words = jax.nn.one_hot(observation.prompt % 512, 512) * observation.prompt_mask[..., None]
    features = [observation.state, jnp.max(words, axis=1)]
    for name, image in sorted(observation.images.items()):
        b, h, w, _ = image.shape
        small = jax.image.resize(image, (b, min(h, 8), min(w, 8), 3), "linear")
        features.append(jnp.where(observation.image_masks[name][:, None], small.reshape(b, -1) / 8, 0.0))
    return jnp.concatenate(features, axis=-1)
