"""Networks by their heads, and what objectives may ask of them.

A head is one file here and one dataclass in `config.model` of the same name; `make_head` finds it.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Float, Int, PRNGKeyArray

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig
from pi0_jax.model.head.compact import CompactNetwork
from pi0_jax.model.head.expert import ExpertNetwork


class Network(Protocol):
    """Predicts something of the shape of a noisy chunk, given observation, chunk and flow time.

    Parameters are those of training or folded ones; the same functions run both.
    """

    @property
    def config(self) -> ModelConfig: ...

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random parameters in linen's boxes, which carry the logical axis names."""
        ...

    def joint(
        self,
        params: dict[str, Any],
        observation: Observation,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b ..."],
        span: Float[Array, "b ..."] | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The prediction in one pass over the observation and all draws, for training."""
        ...

    def prefill(self, params: dict[str, Any], observation: Observation) -> Any:
        """All that depends on neither the chunk nor the time."""
        ...

    def velocity(
        self,
        params: dict[str, Any],
        prefix: Any,
        x: Float[Array, "b ah ad"],
        time: Float[Array, "..."],
        span: Float[Array, "..."] | None = None,
        features: Any = None,
    ) -> Float[Array, "b ah ad"]:
        """The prediction against what `prefill` gave, with `time_features` of that time where they are known."""
        ...

    def time_features(
        self, params: dict[str, Any], time: Float[Array, "..."], span: Float[Array, "..."] | None = None
    ) -> Any:
        """What depends on the time alone; the first axes of its arrays are those of the time."""
        ...


class TokenNetwork(Protocol):
    """Gives logits of action tokens, and decodes them."""

    @property
    def config(self) -> ModelConfig: ...

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Random parameters in linen's boxes, which carry the logical axis names."""
        ...

    def prefill(self, params: dict[str, Any], observation: Observation) -> Any:
        """All that does not depend on the tokens."""
        ...

    def logits(
        self, params: dict[str, Any], observation: Observation, tokens: Int[Array, "b ah d"]
    ) -> Float[Array, "b ah d k"]:
        """Logits of all tokens in one pass."""
        ...

    def decode(self, params: dict[str, Any], prefix: Any) -> Int[Array, "b ah d"]:
        """The likeliest tokens."""
        ...
