"""Discretised actions on the same backbone: what tokenising policies do, to compare flow matching with."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import FlowConfig
from pi0_jax.flow import bins
from pi0_jax.model.bins import BinNetwork
from pi0_jax.model.heads import Network

BINS = ("bins", "bin_sequence")
"""Predictions that are distributions over bins."""


def to_bins(network: Network, actions: Float[Array, "b ah ad"]) -> Int[Array, "b ah d"]:
    """The bins of the dimensions that the network predicts."""
    assert isinstance(network, BinNetwork)
    return bins.to_bins(actions[..., : network.dims], network.config.bins.count)


def bins_loss(network: Network, params, observation: Observation, batch: Batch, flow: FlowConfig) -> Float[Array, ""]:
    """Cross-entropy of the demonstrated bins, over the steps and dimensions that exist.

    Args:
        network, params: a `BinNetwork` and its parameters.
        observation: images in [-1, 1].
        batch: quantile-normalised actions, and masks.
        flow: whether steps after the episode's end count.
    """
    target = to_bins(network, batch.actions)
    logits: Any = network.apply({"params": params}, observation, target)
    counted = jnp.broadcast_to(batch.dim_mask[:, None, : target.shape[-1]], target.shape)
    if flow.mask_padded_steps:
        counted &= batch.step_mask[..., None]
    return bins.bin_loss(logits, target, counted)


def decode_bins(network: Network, params, observation: Observation) -> Float[Array, "b ah ad"]:
    """The middles of the likeliest bins; dimensions without bins are 0."""
    config = network.config
    prefix = network.apply({"params": params}, observation, method="prefill")
    decoded: Any = network.apply({"params": params}, prefix, method="decode")
    actions = bins.from_bins(decoded, config.bins.count)
    return jnp.pad(actions, ((0, 0), (0, 0), (0, config.action_dim - actions.shape[-1])))
