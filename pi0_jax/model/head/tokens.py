"""The discretised head: the action expert gives each action dimension a distribution over bins.

In parallel, one token per step predicts all dimensions of it, from learned queries; autoregressively, one token per
dimension of each step is given the bin before it. Both are baselines for the flow, on the same backbone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pi0_jax.batch import Observation
from pi0_jax.config import Expert, ModelConfig, Tokens
from pi0_jax.errors import UserError
from pi0_jax.model import gemma, layers
from pi0_jax.model.declare import Leaf, Spec, linear
from pi0_jax.model.gemma import Prefix, Segment
from pi0_jax.model.head.expert import ActionTokenNetwork
from pi0_jax.model.layers import Record


@dataclasses.dataclass(frozen=True)
class BinNetwork(ActionTokenNetwork):
    """log p(bins | observation) up to a constant. Dimensions beyond the first ones are padding, without a token."""

    bins: int = 256
    """Bins in each dimension."""
    num_dims: int | None = None
    """Action dimensions that are predicted, the first ones; None: all, padding included."""
    order: Literal["parallel", "autoregressive"] = "parallel"

    @property
    def dims(self) -> int:
        """Number of action dimensions that are predicted."""
        return self.num_dims or self.config.action_dim

    @property
    def head_spec(self) -> Spec:
        width, init = self.config.action.width, nn.initializers.normal(0.02)
        spec = super().head_spec
        if self.order == "parallel":
            spec["queries"] = Leaf((self.config.action_horizon, width), (None, "embed"), init)
        else:
            # One more than there are bins: the first token has none before it.
            spec["bin_embedding"] = Leaf((self.bins + 1, width), ("vocab", "embed"), init)
            spec["dim_embedding"] = Leaf((self.dims, width), (None, "embed"), init)
        outputs = self.bins * (self.dims if self.order == "parallel" else 1)
        return spec | {"logits_out": linear(width, outputs, ("embed", "vocab"))}

    def logits(
        self, params: Spec, observation: Observation, tokens: Int[Array, "b ah d"], record: Record | None = None
    ) -> Float[Array, "b ah d k"]:
        """Logits of all bins in one pass; autoregressively, each given the true bins before it.

        Args:
            params: of this network.
            observation: images in [-1, 1].
            tokens: the true bins; in parallel they are not looked at.
            record: takes the residual streams.
        """
        b, causal = len(tokens), self.order == "autoregressive"
        embedded = self._embed_sequence(params, tokens.reshape(b, -1)) if causal else self._queries(params, b)
        outputs = self.run_jointly(params, observation, embedded, self._condition(b), causal=causal, record=record)
        return self._logits(params, outputs)

    joint = logits

    def decode(self, params: Spec, prefix: Prefix) -> Int[Array, "b ah d"]:
        """The likeliest bins, against a prefix from `prefill`: all at once, or greedily one after another."""
        b = len(prefix.mask)
        if self.order == "parallel":
            outputs, _ = self.run_against(params, prefix, self._queries(params, b), self._condition(b))
            return jnp.argmax(self._logits(params, outputs), axis=-1)
        if prefix.state is not None:
            prefix = self._extended(params, prefix, prefix.state)
        length, start = self.config.action_horizon * self.dims, prefix.mask.shape[1]
        room = ((0, 0), (0, length), (0, 0), (0, 0))
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 4) + room), prefix.keys_values)

        def step(carry, i):
            cache, previous = carry
            decoded = jnp.broadcast_to(jnp.arange(length) < i, (b, length))
            before = Prefix(cache, jnp.concatenate([prefix.mask, decoded], axis=1), prefix.length + i, start + i)
            token = self._embed(params, previous, i % self.dims)[:, None]
            outputs, cache = self.run_against(params, before, token, self._condition(b))
            logits = layers.linear(outputs[:, 0].astype(jnp.float32), params["logits_out"])
            best = jnp.argmax(logits, axis=-1)
            return (cache, best), best

        _, bins = jax.lax.scan(step, (cache, jnp.full(b, self.bins)), jnp.arange(length))
        return bins.T.reshape(b, self.config.action_horizon, self.dims)

    def _extended(self, params: Spec, prefix: Prefix, tokens: Float[Array, "b t e"]) -> Prefix:
        """A prefix that holds further tokens of the action expert, which see one another."""
        b, t, _ = tokens.shape
        segment = Segment("action", tokens, np.zeros(t, int), condition=self._condition(b))
        _, new = gemma.forward(self.config, params["backbone"], [segment], prefix)
        keys_values = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=-3), prefix.keys_values, new)
        mask = jnp.concatenate([prefix.mask, jnp.ones((b, t), bool)], axis=1)
        return Prefix(keys_values, mask, prefix.length + t)

    def _queries(self, params: Spec, b: int) -> Float[Array, "b ah e"]:
        queries = params["queries"]
        return jnp.broadcast_to(queries, (b, *queries.shape)).astype(self.dtype)

    def _embed_sequence(self, params: Spec, bins: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        previous = jnp.pad(bins[:, :-1], ((0, 0), (1, 0)), constant_values=self.bins)
        return self._embed(params, previous, jnp.arange(bins.shape[1]) % self.dims)

    def _embed(self, params: Spec, previous: Int[Array, "b *t"], dim: Int[Array, "*t"]) -> Float[Array, "b *t e"]:
        embedded = params["bin_embedding"][previous]
        return layers.add(embedded, params["dim_embedding"][dim]).astype(self.dtype)

    def _condition(self, b: int) -> Float[Array, "b 1 e"] | None:
        """π0.5's norms take a condition; there is no time here, so it is zero."""
        return jnp.zeros((b, 1, self.config.action.width), self.dtype) if self.config.variant == "pi05" else None

    def _logits(self, params: Spec, outputs: Float[Array, "b t e"]) -> Float[Array, "b ah d k"]:
        logits = layers.linear(outputs.astype(jnp.float32), params["logits_out"])
        return logits.reshape(len(logits), self.config.action_horizon, self.dims, self.bins)


def network(config: ModelConfig, tokens: Tokens) -> BinNetwork:
    """The network of action tokens.

    Raises:
        UserError: the model has no action expert.
    """
    if not isinstance(config.head, Expert):
        raise UserError(f"action tokens need the head Expert; policy.model.head is {type(config.head).__name__}.")
    return BinNetwork(config, tokens.bins, tokens.dims, tokens.order)
