"""The network of `config.head` and `config.prediction`."""

from __future__ import annotations

from pi0_jax.config import ModelConfig
from pi0_jax.model.head.compact import CompactNetwork
from pi0_jax.model.head.expert import ExpertNetwork
from pi0_jax.model.head.tokens import BinNetwork

Network = ExpertNetwork | CompactNetwork | BinNetwork


def make_network(config: ModelConfig) -> Network:
    """The network of `config.head` and `config.prediction`.

    Raises:
        ValueError: unknown ones, or a pair that does not exist.
    """
    if config.prediction in ("bins", "bin_sequence"):
        if config.head != "expert":
            raise ValueError(f"prediction {config.prediction!r} needs the head 'expert'; it is {config.head!r}.")
        order = "parallel" if config.prediction == "bins" else "autoregressive"
        return BinNetwork(config, config.bins.count, config.bins.dims, order)
    if config.prediction not in ("velocity", "average_velocity", "epsilon", "v"):
        raise ValueError(
            f"unknown prediction {config.prediction!r}; choose velocity, average_velocity, epsilon, v, bins or "
            "bin_sequence."
        )
    span = config.prediction == "average_velocity"
    match config.head:
        case "expert":
            return ExpertNetwork(config, span)
        case "compact":
            return CompactNetwork(config, span)
    raise ValueError(f"unknown head {config.head!r}; choose expert or compact.")
