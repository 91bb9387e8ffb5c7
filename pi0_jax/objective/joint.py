"""π0.5's own recipe: text and action tokens by cross-entropy, and a flow beside them (arXiv 2504.16054, 2505.23705).

    loss = text_weight · H(text) + token_weight · H(action tokens) + flow_weight · |velocity - target|²

in one pass over images, prompt, text, action tokens and noisy actions (`model/head/joint.py` says what sees what). With
insulation the flow trains the action expert alone, and the language expert learns from tokens. An example need not have
all three: those without actions (an image with a question and its answer) have text alone, others no text. Each part is
a mean over the examples, or tokens, that have it.

To act, the flow is integrated from noise as any other; where there is a subtask, it is written first (`write`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pi0_jax.batch import Batch, CodecTables, Observation, scale_images
from pi0_jax.config import Joint, ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.flow.loss import flow_loss
from pi0_jax.model.gemma import Prefix
from pi0_jax.model.head import joint
from pi0_jax.model.head.joint import JointNetwork
from pi0_jax.model.writer import Block, Rules, greedy, until
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions, for_validation, gaussian
from pi0_jax.objective.autoregressive import count_of, learnt, reduced, targets_of
from pi0_jax.objective.sampling import make_flow, sample_flow

EOS = 1
"""Id of the end of a sequence in Gemma's vocabulary, and in those that `data.tokenizer` trains."""


class Counts(NamedTuple):
    """What each part of the loss is divided by."""

    text: Int[Array, ""]
    tokens: Int[Array, ""]
    flow: Int[Array, ""]


class Part(NamedTuple):
    """Tokens of one kind, and which of them are learnt."""

    block: Block
    learnt: Bool[Array, "b c"]


def network(config: Joint, model: ModelConfig) -> JointNetwork:
    """The network of the model's action expert, whose language expert writes.

    Raises:
        UserError: settings that do not go together.
    """
    if not config.target_length:
        raise UserError(
            "objective Joint with text_tokens 0 and no codec has no tokens to learn: give it text_tokens or a codec, "
            "or take Gaussian, which learns the flow alone."
        )
    gaussian.network(_flow(config), model)
    return joint.network(model, config.insulate, config.codec.own_table if config.codec else 0)


def make(config: Joint, network: JointNetwork) -> Objective:
    """The objective's functions."""
    flows = gaussian.make(_flow(config), network)

    def draw(batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | int) -> tuple[gaussian.Draws, Counts]:
        draws = gaussian.draw_all(_flow(config), batch, key, step)
        text, *tokens = parts(config, batch)
        found = count(tokens[0], config.reduction) if tokens else jnp.int32(0)
        mask = gaussian.noisy(_flow(config), draws).mask & acts(batch)
        return draws, Counts(count(text, config.reduction), found, jnp.sum(mask))

    def loss(params: Params, draws: gaussian.Draws, counts: Counts) -> tuple[Float[Array, ""], Metrics]:
        it, found = gaussian.noisy(_flow(config), draws), parts(config, draws.batch)
        blocks = [part.block for part in found]
        hidden, velocity = network.write_and_flow(params, it.observation, blocks, it.x, it.time, unseen=len(blocks) - 1)
        of_text_and_codes = [block.tokens for block in blocks], [part.learnt for part in found]
        entropies = network.entropies(params, hidden, *of_text_and_codes)
        losses = [
            reduced(entropy, part.learnt, number, config.reduction)
            for entropy, part, number in zip(entropies, found, counts, strict=False)
        ]
        flow = flow_loss(velocity, it.target, it.mask & acts(draws.batch), counts.flow)
        metrics = dict(zip(("loss_text", "loss_tokens"), losses, strict=False)) | {"loss_flow": flow}
        weights = config.text_weight, config.token_weight
        return sum((w * x for w, x in zip(weights, losses, strict=False)), config.flow_weight * flow), metrics

    def flow_from(prefill, params: Params, observation: Observation, options: SampleOptions):
        """The flow against what `prefill` gives for parameters and an observation."""
        path, predicts, most = config.flow.path, config.flow.predicts, config.flow.max_delay
        return make_flow(network, path, predicts, params, observation, options, max_delay=most, prefill=prefill)

    def flow(params: Params, observation: Observation, options: SampleOptions):
        def prefill(params: Params, observation: Observation) -> Prefix:
            return network.prefill(params, observation, text=_text(options, len(observation.prompt)))

        return flow_from(prefill, params, observation, options)

    def sample(
        params: Params, observation: Observation, noise: Float[Array, "b ah ad"], options: SampleOptions
    ) -> Float[Array, "b ah ad"]:
        return sample_flow(*flow(params, observation, options), noise, options)

    def write(
        params: Params, observation: Observation, noise: Float[Array, "b ah ad"], options: SampleOptions
    ) -> tuple[Float[Array, "b ah ad"], Block]:
        observation = scale_images(observation)
        rules = text_rules(params["embedding"], config, options.codec, len(noise))
        prefix, hidden = network.read(params, observation)
        written = network.decode(params, prefix, hidden, rules, config.text_tokens, greedy)
        text = Block(written.tokens, written.mask)
        if options.guidance_scale is not None:  # which reads the observation twice
            return sample(params, observation, noise, options._replace(text=text)), text

        def known(params: Params, observation: Observation) -> Prefix:
            return network.against(params, observation, written.prefix)

        return sample_flow(*flow_from(known, params, observation, options), noise, options), text

    return flows._replace(draw=draw, loss=loss, sample=sample, flow=flow, write=write)


def text_rules(embedding: Float[Array, "v d"], config: Joint, tables: CodecTables | None, b: int) -> Rules:
    """Any token but those of the codec, and what is above them in the vocabulary, until EOS."""
    end = len(embedding)
    if config.codec is not None and tables is not None and not config.codec.own_table:
        end -= config.codec.skip + len(tables.code_bytes)
    eos = EOS if tables is None else tables.eos
    return until(lambda token: token == eos, embedding[:end], b)


def _text(options: SampleOptions, rows: int) -> Block | None:
    """The text for the rows of an observation, those of guidance among them."""
    if options.text is None or len(options.text.tokens) == rows:
        return options.text
    tokens, mask = options.text
    hidden = mask & (options.guidance_without == "images")  # without the prompt, what follows from it goes, too
    return Block(jnp.concatenate([tokens, tokens]), jnp.concatenate([mask, hidden]))


def plain(config: Joint) -> Joint:
    """The objective whose loss is measured on held-out data."""
    return dataclasses.replace(config, flow=for_validation(config.flow))


def _flow(config: Joint):
    """The flow, with what all parts have in common."""
    common = {"dropout": config.dropout, "mask_padded_steps": config.mask_padded_steps}
    return dataclasses.replace(config.flow, **common)


def acts(batch: Batch) -> Bool[Array, "b 1 1 1"]:
    """Which examples have actions."""
    there = jnp.ones(len(batch.actions), bool) if batch.has_actions is None else batch.has_actions
    return there[:, None, None, None]


def count(part: Part, reduction: str) -> Int[Array, ""]:
    """What a part's loss is divided by; of places, those of tokens that are given do not count."""
    if reduction != "place":
        return count_of(part.learnt, reduction)
    rows, columns = part.learnt.shape
    given = jnp.sum(part.block.mask & ~part.learnt, axis=1)
    return rows * (columns - jnp.min(jnp.where(jnp.any(part.learnt, axis=1), given, columns)))


def parts(config: Joint, batch: Batch) -> list[Part]:
    """Text, and action tokens where there is a codec, each from its first column on."""
    targets, mask = targets_of(batch), learnt(batch, mask_padded_steps=config.mask_padded_steps)
    text = targets.mask & ~targets.is_action
    room, number = config.text_tokens, jnp.sum(text, axis=1, dtype=jnp.int32)
    found = [Part(Block(targets.tokens[:, :room], text[:, :room]), (mask & text)[:, :room])]
    if config.codec is None:
        return found
    place = number[:, None] + jnp.arange(config.codec.max_tokens)[None]
    inside, place = place < targets.tokens.shape[1], jnp.minimum(place, targets.tokens.shape[1] - 1)

    def moved(x: Array) -> Array:
        return jnp.take_along_axis(x, place, axis=1)

    actions = inside & moved(targets.mask & targets.is_action)
    return [*found, Part(Block(moved(targets.tokens), actions), actions & moved(mask))]
