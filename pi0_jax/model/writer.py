"""Networks whose language expert writes: tokens after the prompt, each of which sees those before it.

In training all of them go through the backbone in one pass with the prompt (`Block`); to write, one goes after another
against a cache of keys and values of fixed size, in a loop that ends when every row has (`decode`). The head is tied to
the embedding of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.batch import Observation
from pi0_jax.model import gemma, target
from pi0_jax.model.declare import Spec
from pi0_jax.model.entropy import logits
from pi0_jax.model.gemma import Prefix, Segment
from pi0_jax.model.layers import Record
from pi0_jax.model.prefix import PrefixNetwork
from pi0_jax.model.remat import Remat


class Block(NamedTuple):
    """Tokens of one kind, which come after the prompt and those of earlier blocks."""

    tokens: Int[Array, "b c"]
    mask: Bool[Array, "b c"]
    """False at padding."""


class Rules(NamedTuple):
    """What may be written, and when a row ends."""

    embedding: Float[Array, "v d"]
    """Of the tokens that may be written, to which the head is tied."""
    ids: Int[Array, "v"]
    """Of these in the vocabulary."""
    state: Any
    """What is known of each row before the first token."""
    allowed: Callable[[Any], Bool[Array, "b v"]]
    """Which tokens may come next."""
    after: Callable[[Any, Int[Array, "b"]], tuple[Any, Bool[Array, "b"]]]
    """The state after one more token in each row, and whether the row ends with it."""


def until(ends: Callable[[Int[Array, "b"]], Bool[Array, "b"]], embedding: Float[Array, "v d"], b: int) -> Rules:
    """Any of the first v tokens of the vocabulary, until one that ends a row."""
    count = len(embedding)
    return Rules(
        embedding,
        jnp.arange(count),
        jnp.zeros(b),
        lambda state: jnp.ones((b, count), bool),
        lambda state, token: (state, ends(token)),
    )


class Written(NamedTuple):
    """Tokens that were written, and all before them."""

    tokens: Int[Array, "b n"]
    """Numbers among those that may be written."""
    mask: Bool[Array, "b n"]
    """False after a row's end."""
    prefix: Prefix
    """With room for n more tokens, and perhaps more, at the end; those of the mask are among its valid ones."""


class Writer(PrefixNetwork):
    """Image encoder and language expert with a head over the vocabulary."""

    writes = True

    def segment(
        self,
        params: Spec,
        observation: Observation,
        blocks: Sequence[Block],
        remat: Remat = "none",
        record: Record | None = None,
        *,
        unseen: int = 0,
    ) -> tuple[Segment, list[Int[Array, "b _"]]]:
        """Prompt and blocks as one segment, and of each block, at which tokens its own are predicted: the last valid
        ones before them. The last `unseen` blocks are seen by themselves alone."""
        tokens, valid = self.embed_prefix(params, observation, remat, record)
        length = tokens.shape[1]
        lengths = [block.tokens.shape[1] for block in blocks]
        embedded = [self.embed_tokens(params, block.tokens) for block in blocks]
        tokens = jnp.concatenate([tokens, *embedded], axis=1)
        valid = jnp.concatenate([valid, *(block.mask for block in blocks)], axis=1)
        mask_ar = np.repeat([0, 1], [length, sum(lengths)])
        groups = np.maximum(np.arange(len(blocks) + 1) - (len(blocks) - unseen), 0)
        group = np.repeat(groups, [length, *lengths])
        last = jax.lax.cummax(jnp.where(valid, jnp.arange(valid.shape[1])[None], 0), axis=1)
        ends = length + np.cumsum(lengths)
        before = [last[:, end - n - 1 : end - 1] for n, end in zip(lengths, ends, strict=True)]
        return Segment("language", tokens, mask_ar, group, valid), before

    def read(
        self, params: Spec, observation: Observation, given: Int[Array, "b g"] | None = None
    ) -> tuple[Prefix, Float[Array, "b d"]]:
        """Keys and values of the prompt and of tokens that are given after it, and the output that predicts the next.

        Args:
            params: of this network.
            observation: images in [-1, 1].
            given: ids of tokens that see those before them, none of them padding.
        """
        blocks = [] if given is None else [Block(given, jnp.ones(given.shape, bool))]
        segment, _ = self.segment(params, observation, blocks)
        assert segment.valid is not None
        last = jnp.max(jnp.where(segment.valid, jnp.arange(segment.valid.shape[1])[None], 0), axis=1)
        (output,), keys_values = gemma.forward(self.config, params["backbone"], [segment._replace(needed=last)])
        assert output is not None
        return gemma.prefix_of(segment, keys_values), output[:, 0]

    def decode(
        self,
        params: Spec,
        prefix: Prefix,
        hidden: Float[Array, "b d"],
        rules: Rules,
        room: int,
        choose: Callable[[Float[Array, "b v"], Int[Array, ""]], Int[Array, "b"]],
        *,
        like_openpi: bool = False,
    ) -> Written:
        """Writes tokens until every row has ended, or there is no room.

        Args:
            params: of this network.
            prefix, hidden: of `read`.
            rules: what may be written.
            room: most tokens.
            choose: a token per row from logits, minus infinity where one may not be written, and the number of the
                step.
            like_openpi: as openpi's π0-FAST does, place every token one position too far, and end only once all rows
                end with the same token.
        """
        b, start = len(hidden), prefix.mask.shape[1]
        added = target.aligned(start + room, 128) - start
        cache = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 3) + ((0, added), (0, 0), (0, 0))), prefix.keys_values
        )

        def seen(mask: Bool[Array, "b n"]) -> Bool[Array, "b s"]:
            return jnp.concatenate([prefix.mask, jnp.pad(mask, ((0, 0), (0, added - room)))], axis=1)

        def chosen(i, hidden, state, ended, tokens, mask):
            found = logits(hidden[:, None], rules.embedding)[:, 0]
            token = choose(jnp.where(rules.allowed(state), found, -jnp.inf), i)
            after, ends = rules.after(state, token)
            state = jax.tree.map(lambda new, old: jnp.where(ended, old, new), after, state)
            tokens, mask = tokens.at[:, i].set(jnp.where(ended, 0, token)), mask.at[:, i].set(~ended)
            return state, jnp.all(ends) & (ends | ended) if like_openpi else ended | ends, tokens, mask

        def run(i, cache, tokens, mask):
            """The token of a place goes through the backbone, and into the cache."""
            place = jnp.arange(room)[None] < i
            before = Prefix(cache, seen(mask & place), prefix.length + i + like_openpi, start + i)
            embedded = self.embed_tokens(params, rules.ids[tokens[:, i]][:, None])
            segment = Segment("language", embedded, np.zeros(1, int))
            (output,), cache = gemma.forward(self.config, params["backbone"], [segment], before)
            assert output is not None
            return cache, output[:, 0]

        def step(carry):
            i, cache, state, ended, tokens, mask = carry
            cache, hidden = run(i - 1, cache, tokens, mask)
            return i + 1, cache, *chosen(i, hidden, state, ended, tokens, mask)

        empty = jnp.zeros((b, room), jnp.int32), jnp.zeros((b, room), bool)
        first = chosen(jnp.int32(0), hidden, rules.state, jnp.zeros(b, bool), *empty)
        i, cache, _, _, tokens, mask = jax.lax.while_loop(
            lambda carry: (carry[0] < room) & ~jnp.all(carry[3]), step, (jnp.int32(1), cache, *first)
        )
        cache, _ = run(i - 1, cache, tokens, mask)
        length = prefix.length + jnp.sum(mask, axis=1, dtype=jnp.int32)
        return Written(tokens, mask, Prefix(cache, seen(mask), length))


def greedy(logits: Float[Array, "b v"], step: Int[Array, ""]) -> Int[Array, "b"]:
    """The likeliest tokens."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
