"""Discretised actions on the same backbone: what tokenising policies do, to compare flow matching with."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import FlowConfig, ModelConfig
from pi0_jax.flow import bins
from pi0_jax.model.head.tokens import BinNetwork
from pi0_jax.model.heads import Network

BINS = ("bins", "bin_sequence")
"""Predictions that are distributions over bins."""


def to_bins(network: Network, actions: Float[Array, "b ah ad"]) -> Int[Array, "b ah d"]:
    """The bins of the dimensions that the network predicts."""
    assert isinstance(network, BinNetwork)
    return bins.to_bins(actions[..., : network.dims], network.bins)


def bins_loss(
    network: Network, params, observation: Observation, batch: Batch, flow: FlowConfig, total: Int[Array, ""]
) -> Float[Array, ""]:
    """Cross-entropy of the demonstrated bins, over the steps and dimensions that exist.

    Args:
        network, params: a `BinNetwork` and its parameters.
        observation: images in [-1, 1].
        batch: quantile-normalised actions, and masks.
        flow: whether steps after the episode's end count.
        total: bins that count in the whole batch.
    """
    target = to_bins(network, batch.actions)
    assert isinstance(network, BinNetwork)
    logits = network.logits(params, observation, target)
    return bins.bin_loss(logits, target, counted_bins(network.config, batch, flow), total)


def counted_bins(config: ModelConfig, batch: Batch, flow: FlowConfig) -> Bool[Array, "b ah d"]:
    """Which bins of a batch count."""
    dim_mask = batch.dim_mask[:, None, : config.bins.dims or config.action_dim]
    counted = jnp.broadcast_to(dim_mask, (*batch.actions.shape[:2], dim_mask.shape[-1]))
    return counted & batch.step_mask[..., None] if flow.mask_padded_steps else counted


def decode_bins(network: Network, params, observation: Observation) -> Float[Array, "b ah ad"]:
    """The middles of the likeliest bins; dimensions without bins are 0."""
    assert isinstance(network, BinNetwork)
    config, decoded = network.config, network.decode(params, network.prefill(params, observation))
    actions = bins.from_bins(decoded, network.bins)
    return jnp.pad(actions, ((0, 0), (0, 0), (0, config.action_dim - actions.shape[-1])))
