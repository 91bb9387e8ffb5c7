"""Cross-entropy over a large vocabulary, a few columns of tokens at a time, so that no pass holds all logits.

PaliGemma has 257,152 tokens: the logits of 32 examples of 256 tokens would be 8 GB in float32, and again as much for
their gradient. The backward pass computes each part's logits again. Parts without a token to learn cost nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.model.layers import with_enough_rows

PARTS = 8
"""Parts that the columns are divided into."""


def logits(hidden: Float[Array, "b c d"], embedding: Float[Array, "v d"]) -> Float[Array, "b c v"]:
    """Logits of the head that is tied to the embedding, float32."""
    embedding = embedding.astype(hidden.dtype)

    def of_all(hidden: Float[Array, "_b _t d"]) -> Float[Array, "_b _t v"]:
        return jnp.einsum("BCD,VD->BCV", hidden, embedding, preferred_element_type=jnp.float32)

    product = with_enough_rows(of_all, hidden)
    return with_logical_constraint(product, ("batch", None, "vocab"))


@jax.custom_vjp
def cross_entropy(
    hidden: Float[Array, "b c d"],
    embedding: Float[Array, "v d"],
    tokens: Int[Array, "b c"],
    mask: Bool[Array, "b c"],
) -> Float[Array, "b c"]:
    """Cross-entropy of each token given the output that predicts it, nats; 0 outside the mask.

    Args:
        hidden: outputs of the language expert.
        embedding: of all tokens of the vocabulary.
        tokens: the true ones.
        mask: True where the loss counts.
    """
    parts, narrow = _parts(hidden, tokens, mask), embedding.astype(hidden.dtype)

    def entropy(hidden, tokens, mask):
        found = logits(hidden, narrow)
        chosen = jnp.take_along_axis(found, tokens[..., None], axis=-1)[..., 0]
        return jnp.where(mask, jax.nn.logsumexp(found, axis=-1) - chosen, 0.0)

    def part(_, columns):
        mask = columns[-1]
        return None, jax.lax.cond(jnp.any(mask), entropy, lambda *_: jnp.zeros(mask.shape), *columns)

    return _joined(jax.lax.scan(part, None, parts)[1], tokens.shape[1])


def _forward(hidden, embedding, tokens, mask):
    return cross_entropy(hidden, embedding, tokens, mask), (hidden, embedding, tokens, mask)


def _backward(saved, slope):
    hidden, embedding, tokens, mask = saved
    narrow = embedding.astype(hidden.dtype)

    parts = _parts(hidden, tokens, slope, mask)
    learnt = jnp.any(parts[-1], axis=(1, 2))
    order, count = jnp.argsort(~learnt), jnp.sum(learnt)

    def part(carry):
        # A loop over the parts that have a token. In a branch the sum, gigabytes, would be copied for every part.
        i, total, by_hidden = carry
        hidden, tokens, slope, mask = (jax.lax.dynamic_index_in_dim(x, order[i], keepdims=False) for x in parts)
        found = jax.nn.softmax(logits(hidden, narrow), axis=-1)
        found = found - jax.nn.one_hot(tokens, found.shape[-1], dtype=found.dtype)
        found = (found * jnp.where(mask, slope, 0.0)[..., None]).astype(hidden.dtype)
        total += jnp.einsum("BCV,BCD->VD", found, hidden, preferred_element_type=jnp.float32)
        by_hidden = by_hidden.at[order[i]].set(jnp.einsum("BCV,VD->BCD", found, narrow))
        return i + 1, with_logical_constraint(total, ("vocab", "embed")), by_hidden

    total = with_logical_constraint(jnp.zeros(embedding.shape, jnp.float32), ("vocab", "embed"))
    start = jnp.int32(0), total, jnp.zeros_like(parts[0])
    _, total, by_hidden = jax.lax.while_loop(lambda carry: (carry[0] < PARTS) & (carry[0] < count), part, start)
    return _joined(by_hidden, tokens.shape[1]), total.astype(embedding.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _parts(*arrays: Array) -> tuple[Array, ...]:
    """Arrays `[b c ...]` as `[part b columns ...]`, zeros added at the end."""
    columns = -(-arrays[0].shape[1] // PARTS)

    def divided(x: Array) -> Array:
        added = PARTS * columns - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], PARTS, columns, *x.shape[2:]), 1, 0)

    return tuple(divided(x) for x in arrays)


def _joined(parts: Array, columns: int) -> Array:
    """The inverse of `_parts`, of one array."""
    joined = jnp.moveaxis(parts, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :columns]
