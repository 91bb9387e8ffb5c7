"""A compact head: the backbone's tokens pooled to one vector, and an MLP from it and the noisy chunk to the velocity.

It takes no part in the backbone's attention, so a solver step costs next to nothing; what it cannot do is look at the
observation again. Trains and samples through the same loss and solvers as the action expert.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pi0_jax.batch import Observation
from pi0_jax.config import Compact, ModelConfig
from pi0_jax.config.model import Pooling
from pi0_jax.model import gemma, layers
from pi0_jax.model.declare import Leaf, Spec, linear
from pi0_jax.model.gemma import Segment
from pi0_jax.model.head.expert import embed_time, zero_linear
from pi0_jax.model.layers import Record
from pi0_jax.model.prefix import PrefixNetwork
from pi0_jax.model.remat import Remat


@dataclasses.dataclass(frozen=True)
class CompactNetwork(PrefixNetwork):
    """v(x, t | pooled observation). π0's state is the last token of the prefix; π0.5 has it in the prompt."""

    span: bool = False
    experts = ("language",)

    @property
    def head(self) -> Compact:
        """The head's sizes."""
        assert isinstance(self.config.head, Compact)
        return self.config.head

    @property
    def head_spec(self) -> Spec:
        c, d = self.config, self.config.language.width
        head = self.head
        chunk, width, observed = c.action_horizon * c.action_dim, head.width, head.time_width + d
        spec: Spec = {"state_in": linear(c.action_dim, d, ("action", "embed"))} if c.variant == "pi0" else {}
        if head.pooling == "attention":
            spec["pooling_query"] = Leaf((d,), ("embed",), nn.initializers.normal(d**-0.5))
        spec["time_in"] = linear(head.time_width, head.time_width, ("embed", "embed_out"))
        if self.span:
            spec["span_in"] = zero_linear(head.time_width, head.time_width)
        adaptive = head.conditioning == "adaln"
        if adaptive:
            spec["chunk_in"] = linear(chunk, width, ("action", "embed"))
        inputs = chunk + observed
        for i in range(head.depth):
            spec[f"hidden_{i}"] = linear(width if adaptive or i else inputs, width, ("embed", "mlp"))
            if adaptive:
                spec[f"modulation_{i}"] = zero_linear(observed, 3 * width)
        return spec | {"chunk_out": linear(width if head.depth or adaptive else inputs, chunk, ("mlp", "action"))}

    def joint(
        self,
        params: Spec,
        observation: Observation,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b *s"],
        span: Float[Array, "b *s"] | None = None,
        record: Record | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The velocity; arguments as those of `ExpertNetwork`, but one time per chunk."""
        return self.velocity(params, self._pooled(params, observation, self.config.remat, record), x, time, span)

    def prefill(self, params: Spec, observation: Observation, record: Record | None = None) -> Float[Array, "b d"]:
        """The observation as one vector; zeros where nothing of it is valid."""
        return self._pooled(params, observation, "none", record)

    def _pooled(self, params: Spec, observation: Observation, remat: Remat, record: Record | None):
        tokens, mask = self.embed_prefix(params, observation, remat, record)
        state = self.embed_state(params, observation)
        if state is not None:
            tokens = jnp.concatenate([tokens, state], axis=1)
            mask = jnp.concatenate([mask, jnp.ones((len(mask), 1), bool)], axis=1)
        segment = Segment("language", tokens, np.zeros(tokens.shape[1], int), valid=mask)
        (outputs,), _ = gemma.forward(self.config, params["backbone"], [segment], remat=remat, record=record)
        assert outputs is not None
        return pool(outputs.astype(jnp.float32), mask, self.head.pooling, params.get("pooling_query"))

    def time_features(
        self, params: Spec, time: Float[Array, "*time"], span: Float[Array, "*time"] | None = None
    ) -> Float[Array, "*time e"]:
        """What depends on the time alone."""
        width = self.head.time_width
        embedded = embed_time(time, width)
        if self.span:
            spans = embed_time(jnp.zeros_like(time) if span is None else span, width)
            embedded += layers.linear(spans, params["span_in"])
        return jax.nn.silu(layers.linear(embedded, params["time_in"]))

    def velocity(
        self,
        params: Spec,
        prefix: Float[Array, "b d"],
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "*time"],
        span: Float[Array, "*time"] | None = None,
        features: Float[Array, "*or_one e"] | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The velocity of one solver step, against the vector from `prefill`; one time for all, or one per chunk."""
        features = self.time_features(params, time, span) if features is None else features
        chunks = x.shape[:-2]
        observation = jnp.expand_dims(prefix, range(1, len(chunks)))
        observed = [jnp.broadcast_to(y, (*chunks, y.shape[-1])) for y in (features, observation)]
        condition = jnp.concatenate(observed, axis=-1)
        h = x.astype(jnp.float32).reshape(*chunks, -1)
        names = [f"_{i}" for i in range(self.head.depth)]
        if self.head.conditioning == "concat":
            h = jnp.concatenate([h, condition], axis=-1)
            for i in names:
                h = jax.nn.silu(layers.linear(h, params[f"hidden{i}"]))
        else:
            h = layers.linear(h, params["chunk_in"])
            for i in names:
                modulation = layers.linear(jax.nn.silu(condition), params[f"modulation{i}"])
                scale, shift, gate = jnp.split(modulation, 3, axis=-1)
                y = jax.nn.silu(layers.layer_norm(h) * (1 + scale) + shift)
                h = h + (1 + gate) * layers.linear(y, params[f"hidden{i}"])
        return layers.linear(h, params["chunk_out"]).reshape(x.shape)


def network(config: ModelConfig, span: bool = False) -> CompactNetwork:
    """The network of the head `Compact`."""
    return CompactNetwork(config, span)


def pool(
    tokens: Float[Array, "b s d"],
    mask: Bool[Array, "b s"],
    pooling: Pooling,
    query: Float[Array, "d"] | None = None,
) -> Float[Array, "b d"]:
    """One vector of the valid tokens: the last of them, their mean, or what the query attends to; zeros if none is."""
    match pooling:
        case "last":
            last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
            weights = jax.nn.one_hot(last, mask.shape[1]) * mask
        case "mean":
            weights = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        case "attention":
            assert query is not None
            weights = jax.nn.softmax(tokens @ query, axis=1, where=mask) * jnp.any(mask, axis=1, keepdims=True)
    return jnp.einsum("BS,BSD->BD", weights, tokens)
