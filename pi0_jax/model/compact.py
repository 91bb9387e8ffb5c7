"""A compact head: the backbone's tokens pooled to one vector, and an MLP from it and the noisy chunk to the velocity.

It takes no part in the backbone's attention, so a solver step costs next to nothing; what it cannot do is look at the
observation again. Trains and samples through the same loss and solvers as the action expert.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pi0_jax.batch import Observation
from pi0_jax.model.norm import named
from pi0_jax.model.prefix import PrefixNetwork
from pi0_jax.model.siglip import dense
from pi0_jax.model.velocity import embed_time, zero_dense


class CompactNetwork(PrefixNetwork):
    """v(x, t | pooled observation). π0's state is the last token of the prefix; π0.5 has it in the prompt."""

    def setup_head(self):
        c, float32 = self.config, jnp.dtype("float32")
        width = c.compact.width
        if c.variant == "pi0":
            self.state_in = dense(c.language.width, ("action", "embed"), float32, "state_in")
        if c.compact.pooling == "attention":
            init = named(nn.initializers.normal(c.language.width**-0.5), ("embed",))
            self.pooling_query = self.param("pooling_query", init, (c.language.width,), jnp.float32)
        self.time_in = dense(c.compact.time_width, ("embed", "embed_out"), float32, "time_in")
        if c.prediction == "average_velocity":
            self.span_in = zero_dense(c.compact.time_width, "span_in")
        self.hidden = [dense(width, ("embed", "mlp"), float32, f"hidden_{i}") for i in range(c.compact.depth)]
        if c.compact.conditioning == "adaln":
            self.chunk_in = dense(width, ("action", "embed"), float32, "chunk_in")
            self.modulation = [zero_dense(3 * width, f"modulation_{i}") for i in range(c.compact.depth)]
            self.norm = nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6)
        self.chunk_out = dense(c.action_horizon * c.action_dim, ("mlp", "action"), float32, "chunk_out")

    def __call__(
        self,
        observation: Observation,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b *s"],
        span: Float[Array, "b *s"] | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The velocity; arguments as those of `VelocityNetwork`, but one time a chunk."""
        return self.velocity(self.prefill(observation), x, time, span)

    def prefill(self, observation: Observation) -> Float[Array, "b d"]:
        """The observation as one vector; zeros where nothing of it is valid."""
        tokens, mask = self.embed_prefix(observation)
        if self.config.variant == "pi0":
            state = self.state_in(observation.state)[:, None].astype(self.dtype)
            tokens = jnp.concatenate([tokens, state], axis=1)
            mask = jnp.concatenate([mask, jnp.ones((len(mask), 1), bool)], axis=1)
        (tokens, _), _ = self.backbone(
            (tokens, None),
            jnp.cumsum(mask, axis=1) - 1,
            jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[1])),
        )
        query = self.pooling_query if self.config.compact.pooling == "attention" else None
        return pool(tokens.astype(jnp.float32), mask, self.config.compact.pooling, query)

    def velocity(
        self,
        condition: Float[Array, "b d"],
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b *s"],
        span: Float[Array, "b *s"] | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The velocity of one solver step, against a condition from `prefill`."""
        c = self.config.compact
        embedded = embed_time(time, c.time_width)
        if self.config.prediction == "average_velocity":
            embedded += self.span_in(embed_time(jnp.zeros_like(time) if span is None else span, c.time_width))
        embedded = nn.silu(self.time_in(embedded))
        chunk = x.astype(jnp.float32).reshape(*time.shape, -1)
        condition = jnp.broadcast_to(
            jnp.expand_dims(condition, range(1, time.ndim)), (*time.shape, condition.shape[-1])
        )
        told = jnp.concatenate([embedded, condition], axis=-1)
        if c.conditioning == "concat":
            h = jnp.concatenate([chunk, told], axis=-1)
            for layer in self.hidden:
                h = nn.silu(layer(h))
        else:
            h = self.chunk_in(chunk)
            for layer, modulation in zip(self.hidden, self.modulation, strict=True):
                scale, shift, gate = jnp.split(modulation(nn.silu(told)), 3, axis=-1)
                h = h + (1 + gate) * layer(nn.silu(self.norm(h) * (1 + scale) + shift))
        return self.chunk_out(h).reshape(x.shape)


def pool(
    tokens: Float[Array, "b s d"],
    mask: Bool[Array, "b s"],
    pooling: Literal["last", "mean", "attention"],
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
