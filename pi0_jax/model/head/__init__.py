"""Networks by their heads, and what an objective may ask of them.

The class of `ModelConfig.head` names its file: `Compact` is `head/compact.py`, which has `network(config, span)`. So a
new head is a class in `config/model.py` and a file here.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig, Tokens

Params = dict[str, Any]
"""Parameters of training, or folded ones (`model.fold`); the same functions run both."""


@runtime_checkable
class Network(Protocol):
    """Predicts something of the shape of a noisy chunk, given observation, chunk and flow time."""

    @property
    def config(self) -> ModelConfig: ...

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters in linen's boxes, which carry the logical axis names."""
        ...

    def unrolled(self, params: Params) -> Params:
        """Parameters whose backbone is not scanned, for training; the same functions run them."""
        ...

    def joint(
        self,
        params: Params,
        observation: Observation,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b ..."],
        span: Float[Array, "b ..."] | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The prediction in one pass over the observation and all draws, for training."""
        ...

    def prefill(self, params: Params, observation: Observation) -> Any:
        """All that depends on neither the chunk nor the time."""
        ...

    def velocity(
        self,
        params: Params,
        prefix: Any,
        x: Float[Array, "b ah ad"],
        time: Float[Array, "..."],
        span: Float[Array, "..."] | None = None,
        features: Any = None,
    ) -> Float[Array, "b ah ad"]:
        """The prediction against what `prefill` gave, with `time_features` of that time where they are known."""
        ...

    def time_features(self, params: Params, time: Float[Array, "..."], span: Float[Array, "..."] | None = None) -> Any:
        """What depends on the time alone; the first axes of its arrays are those of the time."""
        ...


@runtime_checkable
class TokenNetwork(Protocol):
    """Gives logits of action tokens, and decodes them."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dims(self) -> int:
        """Number of action dimensions that have tokens."""
        ...

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters in linen's boxes, which carry the logical axis names."""
        ...

    def prefill(self, params: Params, observation: Observation) -> Any:
        """All that does not depend on the tokens."""
        ...

    def logits(
        self, params: Params, observation: Observation, tokens: Int[Array, "b ah d"]
    ) -> Float[Array, "b ah d k"]:
        """Logits of all tokens in one pass."""
        ...

    def decode(self, params: Params, prefix: Any) -> Int[Array, "b ah d"]:
        """The likeliest tokens."""
        ...


def make_head(model: ModelConfig, span: bool = False) -> Network:
    """The network of a model's head; with `span` it takes a second time."""
    return importlib.import_module(f"{__name__}.{type(model.head).__name__.lower()}").network(model, span)


def make_tokens(model: ModelConfig, tokens: Tokens) -> TokenNetwork:
    """The network of action tokens.

    Raises:
        UserError: the model's head has none.
    """
    return importlib.import_module(f"{__name__}.tokens").network(model, tokens)
