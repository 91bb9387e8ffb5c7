"""Heads (interim adapter of the linen modules to the functional protocol)."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp

from pi0_jax.batch import Observation
from pi0_jax.config import Compact, ModelConfig, Tokens


class Network(Protocol):
    config: ModelConfig

    def init(self, key) -> Any: ...
    def joint(self, params, observation, x, time, span=None) -> Any: ...
    def prefill(self, params, observation) -> Any: ...
    def velocity(self, params, prefix, x, time, span=None, features=None) -> Any: ...
    def time_features(self, params, time, span=None) -> Any: ...


class TokenNetwork(Protocol):
    config: ModelConfig
    dims: int

    def init(self, key) -> Any: ...
    def prefill(self, params, observation) -> Any: ...
    def logits(self, params, observation, tokens) -> Any: ...
    def decode(self, params, prefix) -> Any: ...


@dataclasses.dataclass(frozen=True)
class _Bins:
    count: int
    dims: int | None


@dataclasses.dataclass(frozen=True)
class _Old(ModelConfig):
    prediction: str = "velocity"
    compact: Compact = Compact()
    bins: Any = None


def _old(model: ModelConfig, **changes) -> _Old:
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)}
    compact = isinstance(model.head, Compact)
    fields |= {"head": "compact" if compact else "expert", "compact": model.head if compact else Compact()}
    return _Old(**(fields | changes))


class _Adapter:
    def __init__(self, config: ModelConfig, module):
        self.config, self._module = config, module
        self.dims = getattr(module, "dims", None)

    def _call(self, params, method, *args):
        return self._module.apply({"params": params}, *args, method=method)

    def init(self, key):
        c = self.config
        size = c.vision.image_size
        observation = Observation(
            images={name: jnp.zeros((1, size, size, 3)) for name in c.cameras},
            image_masks={name: jnp.ones(1, bool) for name in c.cameras},
            state=jnp.zeros((1, c.action_dim)),
            prompt=jnp.zeros((1, c.prompt_length), jnp.int32),
            prompt_mask=jnp.ones((1, c.prompt_length), bool),
        )
        if self.dims:
            return self._module.init(key, observation, jnp.zeros((1, c.action_horizon, self.dims), jnp.int32))["params"]
        return self._module.init(key, observation, jnp.zeros((1, c.action_horizon, c.action_dim)), jnp.zeros(1))[
            "params"
        ]

    def joint(self, params, observation, x, time, span=None):
        return self._call(params, "__call__", observation, x, time, *(() if span is None else (span,)))

    def prefill(self, params, observation):
        return self._call(params, "prefill", observation)

    def velocity(self, params, prefix, x, time, span=None, features=None):
        return self._call(params, "velocity", prefix, x, time, *(() if span is None else (span,)))

    def time_features(self, params, time, span=None):
        return None

    def logits(self, params, observation, tokens):
        return self._call(params, "__call__", observation, tokens)

    def decode(self, params, prefix):
        return self._call(params, "decode", prefix)


def make_head(model: ModelConfig, span: bool = False) -> Network:
    from pi0_jax.model.compact import CompactNetwork
    from pi0_jax.model.velocity import VelocityNetwork

    kind = CompactNetwork if isinstance(model.head, Compact) else VelocityNetwork
    return _Adapter(model, kind(_old(model, prediction="average_velocity" if span else "velocity")))


def make_tokens(model: ModelConfig, tokens: Tokens) -> TokenNetwork:
    from pi0_jax.model.bins import BinNetwork

    kind = "bins" if tokens.order == "parallel" else "bin_sequence"
    return _Adapter(model, BinNetwork(_old(model, prediction=kind, bins=_Bins(tokens.bins, tokens.dims))))
