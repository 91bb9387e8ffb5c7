"""π0-FAST: the language expert writes action tokens, one after another (arXiv 2501.09747).

    images, prompt   both ways among themselves
    action tokens    each sees those before it: "Action: ", codes of the FAST codec, `|`, EOS

The loss is the cross-entropy of each action token given those before it. To act, they are decoded against the keys and
values of images and prompt, and turned into actions within the same program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pi0_jax.batch import Batch, CodecTables, Observation, Targets, scale_images
from pi0_jax.config import Autoregressive, Fast, ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.model import fast
from pi0_jax.model.entropy import cross_entropy
from pi0_jax.model.head import language
from pi0_jax.model.head.language import LanguageNetwork
from pi0_jax.model.writer import Block, Rules, Writer, greedy, until
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions
from pi0_jax.objective.conditioning import check_dropout, drop
from pi0_jax.sampler import Categorical, Decoder


class Draws(NamedTuple):
    """Examples; the first axis of every array counts them."""

    batch: Batch
    dropout: Float[Array, "b"]
    """In [0, 1): decides what of the observation is dropped."""


def network(config: Autoregressive, model: ModelConfig) -> LanguageNetwork:
    """The backbone alone.

    Raises:
        UserError: the model has an action expert.
    """
    check_dropout(config.dropout)
    if config.codec.own_table:
        raise UserError("codec.own_table is for objective Joint; π0-FAST writes ids of the vocabulary: take 0.")
    return language.network(model)


def make(config: Autoregressive, network: LanguageNetwork) -> Objective:
    """The objective's functions."""

    def supervised(batch: Batch) -> Bool[Array, "b c"]:
        return learnt(batch, mask_padded_steps=config.mask_padded_steps)

    def draw(batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | int) -> tuple[Draws, Int[Array, ""]]:
        dropout = jax.random.uniform(jax.random.fold_in(key, 2), (len(batch.actions),))
        return Draws(batch, dropout), count_of(supervised(batch), config.reduction)

    def loss(params: Params, draws: Draws, count: Int[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        observation = drop(scale_images(draws.batch.observation), draws.dropout, config.dropout)
        targets = targets_of(draws.batch)
        (hidden,) = network.joint(params, observation, [Block(targets.tokens, targets.mask)])
        mask = supervised(draws.batch)
        entropy = cross_entropy(hidden, params["embedding"], targets.tokens, mask)
        return reduced(entropy, mask, count, config.reduction), {}

    def sample(
        params: Params, observation: Observation, noise: Float[Array, "b ah ad"], options: SampleOptions
    ) -> Float[Array, "b ah ad"]:
        if options.guidance_scale is not None or options.previous is not None:
            raise UserError("guidance and real-time chunking steer a flow; this network writes action tokens.")
        return act(network, params, scale_images(observation), config.codec, noise.shape[1:], options)

    return Objective(network, draw, loss, sample)


def act(
    network: Writer,
    params: Params,
    observation: Observation,
    config: Fast,
    shape: tuple[int, ...],
    options: SampleOptions,
) -> Float[Array, "b ah ad"]:
    """Actions from action tokens.

    Args:
        network: with `params`.
        observation: images in [-1, 1].
        config: where codes are in the vocabulary.
        shape: actions per chunk, and dimensions of the model.
        options: with a decoder, the codec, and keys if tokens are drawn at random.

    Raises:
        UserError: these are lacking.
    """
    sampler, tables = options.sampler, options.codec
    if not isinstance(sampler, Decoder):
        raise UserError(f"action tokens are decoded by Greedy or Categorical; policy.sampler is {sampler}.")
    if tables is None:
        raise UserError(
            "action tokens cannot become actions without their codec, which this policy has not. Convert or train "
            "again with one (a folder such as physical-intelligence/fast)."
        )
    b = len(observation.prompt)
    begin = tables.marker if sampler.constrained else tables.marker[: int(config.bos)]
    given = jnp.broadcast_to(begin, (b, len(begin))) if len(begin) else None
    like_openpi = sampler.like == "openpi"
    if sampler.like == "lerobot" and given is not None:
        observation, given = seen_by_prompt(observation, given), None
    prefix, hidden = network.read(params, observation, given)
    if sampler.constrained:
        rules = constrained(params["embedding"], config, tables, shape[0], b)
        room = config.max_tokens - len(begin) - 2  # `|` and EOS need not be written
    else:
        bar = tables.eos if like_openpi else tables.bar
        rules = until(lambda token: (token == tables.eos) | (token == bar), params["embedding"], b)
        room = config.max_tokens - len(begin)
    if room < 1:
        raise UserError(f"codec.max_tokens is {config.max_tokens}, which leaves no room for codes; 256 is usual.")
    choose = chooser(sampler, options.keys)
    written = network.decode(params, prefix, hidden, rules, room, choose, like_openpi=like_openpi)
    codes, mask = written.tokens, written.mask
    if not sampler.constrained:
        mask = mask & (jnp.cumsum((codes == tables.bar) | (codes == tables.eos), axis=1) == 0)
        codes, mask = codes_of(codes, mask, config, tables, params["embedding"].shape[0])
    return fast.decode(codes, mask, tables, (shape[0], shape[1]))


def constrained(embedding: Float[Array, "v d"], config: Fast, tables: CodecTables, horizon: int, b: int) -> Rules:
    """Codes alone, until a row has as many coefficients as a chunk has."""
    codes, (vocabulary, _) = len(tables.code_bytes), embedding.shape
    if vocabulary - config.skip - codes < 0:
        raise UserError(f"{codes} codes do not fit below the last {config.skip} of {vocabulary} ids of the vocabulary.")
    grammar, total = fast.grammar(tables), horizon * tables.dims
    first = vocabulary - config.skip - codes

    def after(state, code):
        state = fast.after(grammar, state, code)
        whole = (state.begun >= total) & (state.lacking == 0)
        return state, whole | ~jnp.any(fast.may_follow(grammar, state, total), axis=1)

    zeros = jnp.zeros(b, jnp.int32)
    return Rules(
        embedding[first : first + codes][::-1],
        first + codes - 1 - jnp.arange(codes),
        fast.Written(zeros, zeros),
        lambda state: fast.may_follow(grammar, state, total),
        after,
    )


def seen_by_prompt(observation: Observation, tokens: Int[Array, "b g"]) -> Observation:
    """The observation with further tokens of the prompt, which all of it sees."""
    mask = jnp.ones(tokens.shape, bool)
    return observation._replace(
        prompt=jnp.concatenate([observation.prompt, tokens], axis=1),
        prompt_mask=jnp.concatenate([observation.prompt_mask, mask], axis=1),
    )


def codes_of(
    tokens: Int[Array, "b n"], mask: Bool[Array, "b n"], config: Fast, tables: CodecTables, vocabulary: int
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """Codes among the ids of the vocabulary; what is none is left out."""
    codes = vocabulary - 1 - config.skip - tokens
    valid = mask & (codes >= 0) & (codes < len(tables.code_bytes))
    return jnp.where(valid, codes, 0), valid


def chooser(sampler: Decoder, keys: Key[Array, "b"] | None):
    """How a token is chosen from logits.

    Raises:
        UserError: at random, and there are no keys.
    """
    if not isinstance(sampler, Categorical):
        return greedy
    if keys is None:
        raise UserError("Categorical draws tokens at random, which takes a key per chunk (SampleOptions.keys).")

    def draw(logits: Float[Array, "b v"], step: Int[Array, ""]) -> Int[Array, "b"]:
        of_step = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        return jax.vmap(jax.random.categorical)(of_step, logits / sampler.temperature).astype(jnp.int32)

    return draw


def targets_of(batch: Batch) -> Targets:
    """Tokens to be learnt.

    Raises:
        UserError: there are none.
    """
    if batch.targets is None:
        raise UserError("this objective learns tokens, and the batch has none (Batch.targets).")
    return batch.targets


def learnt(batch: Batch, *, mask_padded_steps: bool) -> Bool[Array, "b c"]:
    """Tokens that are in the loss; with `mask_padded_steps`, none of an example that has actions, and no step of these
    to learn: it fills up a batch."""
    targets = targets_of(batch)
    mask = targets.mask & targets.loss_mask
    if not mask_padded_steps:
        return mask
    counts = jnp.any(batch.step_mask, axis=1)
    counts = counts if batch.has_actions is None else counts | ~batch.has_actions
    return mask & counts[:, None]


def count_of(mask: Bool[Array, "b c"], reduction: str) -> Int[Array, ""]:
    """What the loss is divided by: examples that have a token, or tokens."""
    return jnp.sum(jnp.any(mask, axis=1)) if reduction == "example" else jnp.sum(mask)


def reduced(
    entropy: Float[Array, "b c"], mask: Bool[Array, "b c"], count: Int[Array, ""], reduction: str
) -> Float[Array, ""]:
    """The mean, over examples of an example's tokens, or over tokens; of microbatches, their share in it."""
    total = jnp.sum(entropy, axis=1)
    if reduction == "example":
        total = total / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return jnp.sum(total) / jnp.maximum(count, 1)
