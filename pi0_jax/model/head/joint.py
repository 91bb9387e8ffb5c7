"""π0.5 as it was published: the language expert writes text and action tokens, beside an action expert's flow.

    [ images, prompt ]   language expert   both ways among themselves
    [ text ]             language expert   causal
    [ action tokens ]    language expert   causal; seen by nothing after them
    [ actions ]          action expert     see images, prompt and text, not the action tokens

So the flow learns without knowing its answer, and acts without action tokens. With insulation no gradient goes from
the action expert into the keys and values that it reads (arXiv 2505.23705).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.batch import Observation
from pi0_jax.config import Expert, ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.model import gemma, layers
from pi0_jax.model.declare import Leaf, Spec, linear
from pi0_jax.model.entropy import cross_entropy
from pi0_jax.model.gemma import Prefix
from pi0_jax.model.head.expert import ExpertNetwork
from pi0_jax.model.layers import Record
from pi0_jax.model.writer import Block, Writer

CODE_TABLE, CODE_HEAD = "code_embedding", "code_head"
"""Parameters of codes that are not of the vocabulary."""


@dataclasses.dataclass(frozen=True)
class JointNetwork(Writer, ExpertNetwork):
    """The network of π0.5 whose language expert writes; its parameters are the same, but for a table of codes."""

    insulate: bool = True
    own_table: int = 0
    """Codes with an embedding and a linear head of their own: ids vocab_size and above."""

    @property
    def head_spec(self) -> Spec:
        width, spec = self.config.language.width, super().head_spec
        if not self.own_table:
            return spec
        # Unlike the vocabulary's, these embeddings are not scaled by the root of the width.
        table = Leaf((self.own_table, width), ("vocab", "embed"), nn.initializers.normal(1.0))
        return spec | {CODE_TABLE: table, CODE_HEAD: linear(width, self.own_table, ("embed", "vocab"))}

    def embed_tokens(self, params: Spec, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """As of `PrefixNetwork`, and codes."""
        if not self.own_table:
            return super().embed_tokens(params, tokens)
        code = tokens - self.config.vocab_size
        words = super().embed_tokens(params, jnp.minimum(tokens, self.config.vocab_size - 1))
        codes = params[CODE_TABLE][jnp.maximum(code, 0)].astype(self.dtype)
        return jnp.where(code[..., None] >= 0, codes, words)

    def entropies(
        self,
        params: Spec,
        hidden: Sequence[Float[Array, "b _ d"]],
        tokens: Sequence[Int[Array, "b _"]],
        learnt: Sequence[Bool[Array, "b _"]],
    ) -> list[Float[Array, "b _"]]:
        """Cross-entropy of text, and of action tokens, given the outputs that predict them, nats; 0 where nothing is
        learnt. What is of the vocabulary goes through its table, and makes that one's gradient, together."""
        words = 1 if self.own_table else len(tokens)
        hidden_words, of_words, mask = (jnp.concatenate(x[:words], axis=1) for x in (hidden, tokens, learnt))
        ends = np.cumsum([x.shape[1] for x in tokens[:words]])
        found = jnp.split(cross_entropy(hidden_words, params["embedding"], of_words, mask), ends[:-1], axis=1)
        for x, codes, there in zip(hidden[words:], tokens[words:], learnt[words:], strict=True):
            logits = layers.linear(x.astype(jnp.float32), params[CODE_HEAD])
            code = jnp.maximum(codes - self.config.vocab_size, 0)
            found.append(jnp.where(there, optax.softmax_cross_entropy_with_integer_labels(logits, code), 0.0))
        return found

    def write_and_flow(
        self,
        params: Spec,
        observation: Observation,
        blocks: Sequence[Block],
        x: Float[Array, "b s ah ad"],
        time: Float[Array, "b *s_or_ah"],
        *,
        unseen: int = 0,
    ) -> tuple[list[Float[Array, "b _ d"]], Float[Array, "b s ah ad"]]:
        """One pass over everything, for training.

        Args:
            params: of this network.
            observation: images in [-1, 1].
            blocks: tokens after the prompt.
            x: noisy chunks of s draws.
            time: flow time, one per draw or per action.
            unseen: how many of the blocks, the last ones, the actions do not see.

        Returns:
            Outputs that predict the tokens of each block, and the velocity.
        """
        remat, b = self.config.remat, len(x)
        language, before = self.segment(params, observation, blocks, remat, unseen=unseen)
        actions, condition = self._embed_draws(params, x, time)
        suffix = self._suffix(self.embed_state(params, observation), actions, condition, x.shape[1])
        assert suffix.group is not None
        group = np.where(suffix.group > 0, suffix.group + unseen, 0)
        suffix = suffix._replace(group=group, reads_with_gradient=not self.insulate)
        (written, outputs), _ = gemma.forward(self.config, params["backbone"], [language, suffix], remat=remat)
        assert written is not None
        assert outputs is not None
        hidden = [jnp.take_along_axis(written, places[..., None], axis=1) for places in before]
        return hidden, self._project(params, outputs[:, -actions.shape[1] :]).reshape(b, *x.shape[1:])

    def prefill(
        self, params: Spec, observation: Observation, record: Record | None = None, text: Block | None = None
    ) -> Prefix:
        """As of `ExpertNetwork`, with text that was written after the prompt."""
        segment, _ = self.segment(params, observation, [] if text is None else [text], record=record)
        _, keys_values = gemma.forward(self.config, params["backbone"], [segment], record=record)
        return self.against(params, observation, gemma.prefix_of(segment, keys_values))

    def against(self, params: Spec, observation: Observation, prefix: Prefix) -> Prefix:
        """What was read and written, as a prefix that `velocity` takes."""
        return self.placed(prefix._replace(state=self.embed_state(params, observation)))


def network(config: ModelConfig, insulate: bool, own_table: int) -> JointNetwork:
    """The network of a model with an action expert; arguments are its fields.

    Raises:
        UserError: it has none.
    """
    if not isinstance(config.head, Expert):
        raise UserError(f"objective Joint needs the head Expert; policy.model.head is {type(config.head).__name__}.")
    return JointNetwork(config, insulate=insulate, own_table=own_table)
