"""Which network a configuration means."""

from __future__ import annotations

from pi0_jax.config import ModelConfig
from pi0_jax.model.bins import BinNetwork
from pi0_jax.model.compact import CompactNetwork
from pi0_jax.model.velocity import VelocityNetwork

Network = VelocityNetwork | CompactNetwork | BinNetwork


def make_network(config: ModelConfig) -> Network:
    """The network of `config.head` and `config.prediction`.

    Raises:
        ValueError: unknown ones, or a pair that does not exist.
    """
    if config.prediction in ("bins", "bin_sequence"):
        if config.head != "expert":
            raise ValueError(f"prediction {config.prediction!r} needs the head 'expert'; it is {config.head!r}.")
        return BinNetwork(config)
    if config.prediction not in ("velocity", "average_velocity", "epsilon", "v"):
        raise ValueError(
            f"unknown prediction {config.prediction!r}; choose velocity, average_velocity, epsilon, v, bins or "
            "bin_sequence."
        )
    match config.head:
        case "expert":
            return VelocityNetwork(config)
        case "compact":
            return CompactNetwork(config)
    raise ValueError(f"unknown head {config.head!r}; choose expert or compact.")
