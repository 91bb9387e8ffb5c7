"""Discretised actions: cross-entropy over uniform bins per dimension, after RT-2 (arXiv 2307.15818) and OpenVLA.

Bins span [-1, 1], which in quantile-normalised units is the 1st to the 99th percentile of each dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from pi0_jax.batch import Batch, Observation, scale_images
from pi0_jax.config import ModelConfig, Tokens
from pi0_jax.errors import UserError
from pi0_jax.model.head import TokenNetwork, make_tokens
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions
from pi0_jax.objective.conditioning import check_dropout, drop
from pi0_jax.sampler import Greedy


class Draws(NamedTuple):
    """Examples; the first axis of every array counts them."""

    batch: Batch
    dropout: Float[Array, "b"]
    """In [0, 1): decides what of the observation is dropped."""


def network(config: Tokens, model: ModelConfig) -> TokenNetwork:
    """The network whose action tokens give distributions over bins."""
    check_dropout(config.dropout)
    return make_tokens(model, config)


def make(config: Tokens, network: TokenNetwork) -> Objective:
    """The objective's functions."""

    def draw(batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | int) -> tuple[Draws, Int[Array, ""]]:
        dropout = jax.random.uniform(jax.random.fold_in(key, 2), (len(batch.actions),))
        return Draws(batch, dropout), jnp.sum(mask(batch))

    def mask(batch: Batch) -> Bool[Array, "b ah d"]:
        dims = batch.dim_mask[:, None, : network.dims]
        dims = jnp.broadcast_to(dims, (*batch.actions.shape[:2], dims.shape[-1]))
        return dims & batch.step_mask[..., None] if config.mask_padded_steps else dims

    def loss(params: Params, draws: Draws, count: Int[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        observation = drop(scale_images(draws.batch.observation), draws.dropout, config.dropout)
        tokens = to_bins(draws.batch.actions[..., : network.dims], config.bins)
        logits = network.logits(params, observation, tokens)
        return cross_entropy(logits, tokens, mask(draws.batch), count), {}

    def sample(
        params: Params, observation: Observation, noise: Float[Array, "b ah ad"], options: SampleOptions
    ) -> Float[Array, "b ah ad"]:
        if not isinstance(options.sampler, Greedy):
            raise UserError(f"action tokens are decoded by Greedy; policy.sampler is {options.sampler}.")
        if options.guidance_scale is not None or options.previous is not None:
            raise UserError("guidance and real-time chunking steer a flow; this network predicts action tokens.")
        tokens = network.decode(params, network.prefill(params, scale_images(observation)))
        actions = from_bins(tokens, config.bins)
        return jnp.pad(actions, ((0, 0), (0, 0), (0, noise.shape[-1] - actions.shape[-1])))

    return Objective(network, draw, loss, sample)


def to_bins(actions: Float[Array, "*b"], count: int) -> Int[Array, "*b"]:
    """Number of the bin, 0 … count - 1; what lies outside [-1, 1] goes to the outermost."""
    return jnp.clip(jnp.floor((actions + 1) / 2 * count), 0, count - 1).astype(jnp.int32)


def from_bins(bins: Int[Array, "*b"], count: int) -> Float[Array, "*b"]:
    """The middle of a bin, at most 1 / count from any action in it."""
    return (bins + 0.5) / count * 2 - 1


def cross_entropy(
    logits: Float[Array, "*b ah ad k"],
    tokens: Int[Array, "*b ah ad"],
    mask: Bool[Array, "*b ah ad"],
    count: Int[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy over the entries of the mask, nats; 0 where it is empty.

    Args:
        logits: of all bins.
        tokens: the true bins.
        mask: True where the loss counts.
        count: what to divide by; None: the number of the mask's entries.
    """
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)
    return jnp.sum(jnp.where(mask, entropy, 0.0)) / jnp.maximum(jnp.sum(mask) if count is None else count, 1)
