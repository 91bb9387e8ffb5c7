"""The discretised head: the action expert gives each action dimension a distribution over bins.

In parallel, one token a step predicts all dimensions of it, from learned queries; in sequence, one token a dimension
of each step, told the bin before it. Both are baselines for the flow, on the same backbone.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pi0_jax.batch import Observation
from pi0_jax.model.norm import named
from pi0_jax.model.siglip import dense
from pi0_jax.model.velocity import ActionTokenNetwork, Prefix


class BinNetwork(ActionTokenNetwork):
    """log p(bins | observation) up to a constant. Dimensions beyond `config.bins.dims` are padding, without a token."""

    @property
    def dims(self) -> int:
        """Action dimensions that are predicted."""
        return self.config.bins.dims or self.config.action_dim

    def setup_head(self):
        super().setup_head()
        c, float32 = self.config, jnp.dtype("float32")
        width, init = c.action.width, nn.initializers.normal(0.02)
        if c.prediction == "bins":
            self.queries = self.param("queries", named(init, (None, "embed")), (c.action_horizon, width), jnp.float32)
            self.logits_out = dense(self.dims * c.bins.count, ("embed", "vocab"), float32, "logits_out")
        else:
            # One more than there are bins: the first token has none before it.
            shape = (c.bins.count + 1, width)
            self.bin_embedding = self.param("bin_embedding", named(init, ("vocab", "embed")), shape, jnp.float32)
            shape = (self.dims, width)
            self.dim_embedding = self.param("dim_embedding", named(init, (None, "embed")), shape, jnp.float32)
            self.logits_out = dense(c.bins.count, ("embed", "vocab"), float32, "logits_out")

    def __call__(self, observation: Observation, bins: Int[Array, "b ah d"]) -> Float[Array, "b ah d k"]:
        """Logits of all bins in one pass; in sequence, each given the true bins before it.

        Args:
            observation: images in [-1, 1].
            bins: the true bins; in parallel they are not looked at.
        """
        b, sequential = len(bins), self.config.prediction == "bin_sequence"
        tokens = self._sequence_tokens(bins.reshape(b, -1)) if sequential else self._query_tokens(b)
        outputs = self.run_jointly(observation, tokens, self._condition(b), causal=sequential)
        return self._logits(outputs, b)

    def decode(self, prefix: Prefix) -> Int[Array, "b ah d"]:
        """The likeliest bins, against a prefix from `prefill`: all at once, or greedily one after another."""
        b = len(prefix.mask)
        if self.config.prediction == "bins":
            outputs, _ = self.run_against(prefix, self._query_tokens(b), self._condition(b))
            return jnp.argmax(self._logits(outputs, b), axis=-1)
        count, length = self.config.bins.count, self.config.action_horizon * self.dims
        start = prefix.mask.shape[1]
        room = ((0, 0), (0, 0), (0, length), (0, 0), (0, 0))
        cache = jax.tree.map(lambda x: jnp.pad(x, room), prefix.keys_values)

        def step(carry, i):
            cache, previous = carry
            token = self._token(previous, i % self.dims)[:, None]
            decoded = jnp.broadcast_to(jnp.arange(length) < i, (b, length))
            mask = jnp.concatenate([prefix.mask, decoded, jnp.ones((b, 1), bool)], axis=1)[:, None]
            position = prefix.length[:, None] + i
            outputs, new = self.backbone((None, token), position, mask, self._condition(b), cache)
            cache = jax.tree.map(
                lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start + i, axis=2),
                cache,
                new,
            )
            best = jnp.argmax(self.logits_out(outputs[1][:, 0].astype(jnp.float32)), axis=-1)
            return (cache, best), best

        carry = (cache, jnp.full(b, count))
        if self.is_initializing():
            raise AssertionError("initialise through __call__")
        _, bins = nn.transforms.scan(
            lambda _, carry, i: step(carry, i), variable_broadcast="params", split_rngs={"params": False}
        )(self, carry, jnp.arange(length))
        return bins.T.reshape(b, self.config.action_horizon, self.dims)

    def _query_tokens(self, b: int) -> Float[Array, "b ah d"]:
        return jnp.broadcast_to(self.queries, (b, *self.queries.shape)).astype(self.dtype)

    def _sequence_tokens(self, bins: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        previous = jnp.pad(bins[:, :-1], ((0, 0), (1, 0)), constant_values=self.config.bins.count)
        return self._token(previous, jnp.arange(bins.shape[1]) % self.dims)

    def _token(self, previous, dim) -> Float[Array, "b *t d"]:
        return (self.bin_embedding[previous] + self.dim_embedding[dim]).astype(self.dtype)

    def _condition(self, b: int) -> Float[Array, "b 1 d"] | None:
        """π0.5's norms want a condition; there is no time here, so it is zero."""
        return jnp.zeros((b, 1, self.config.action.width), self.dtype) if self.config.variant == "pi05" else None

    def _logits(self, outputs: Float[Array, "b t d"], b: int) -> Float[Array, "b ah d k"]:
        logits = self.logits_out(outputs.astype(jnp.float32))
        return logits.reshape(b, self.config.action_horizon, self.dims, self.config.bins.count)
