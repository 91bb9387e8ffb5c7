"""Transformed samples of raw observations as arrays that a program takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.batch import Observation
from pi0_jax.config import PolicyConfig
from pi0_jax.data.targets import Count
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import ANCHORS, Sample, to_observation
from pi0_jax.errors import UserError
from pi0_jax.flow.realtime import Previous
from pi0_jax.inference.shapes import prompt_lengths
from pi0_jax.model.writer import Block

_cut = Count("subtasks were cut to the tokens that the policy reads (objective.text_tokens).")


class Prepared(NamedTuple):
    """Observations as the sampler takes them."""

    observation: Observation
    anchors: dict[str, np.ndarray]
    """States that relative actions and signs of quaternions refer to, by key, if there are such."""
    previous: Previous | None
    """What is left of the chunks in execution, if any is."""
    text: Block | None
    """Subtasks that came with the observations, if any did."""


def prepare(
    samples: Sequence[Sample], config: PolicyConfig, tokenizer: Tokenizer, cameras: Sequence[str], length: int | None
) -> Prepared:
    """Stacks samples, with the given cameras alone, and prompts cut to the length, or to what they need.

    Raises:
        UserError: a subtask for a policy that reads none.
    """
    anchors = {key: np.stack([np.asarray(x.get(key)) for x in samples]) for key in ANCHORS if key in samples[0]}
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(to_observation, samples))
    needed = int(stacked.prompt_mask.sum(axis=1).max())
    length = length or next(n for n in prompt_lengths(config.model.prompt_length) if n >= needed)
    stacked = stacked._replace(
        images={name: stacked.images[name] for name in cameras},
        image_masks={name: stacked.image_masks[name] for name in cameras},
        prompt=stacked.prompt[:, :length],
        prompt_mask=stacked.prompt_mask[:, :length],
    )
    return Prepared(stacked, anchors, _previous(samples, config), _text(samples, config, tokenizer))


def _previous(samples: Sequence[Sample], config: PolicyConfig) -> Previous | None:
    """What remains of the chunks in execution, relative to the new state where actions are relative.

    A trained network cannot be told of more certain actions than it learned with: only so many are."""
    if not any("previous" in sample for sample in samples):
        return None
    model, trained = config.model, config.real_time.method == "trained"
    max_delay = getattr(config.objective, "max_delay", 0)
    actions = np.zeros((len(samples), model.action_horizon, model.action_dim), np.float32)
    delay, end = np.zeros((2, len(samples)), np.int32)
    for i, sample in enumerate(samples):
        left = sample.get("previous", actions[0, :0])[: model.action_horizon]
        actions[i, : len(left)], end[i] = left, len(left)
        delay[i] = min(sample.get("delay", 0), len(left), max_delay if trained else len(left))
    return Previous(*map(jnp.asarray, (actions, delay, end)))


def _text(samples: Sequence[Sample], config: PolicyConfig, tokenizer: Tokenizer) -> Block | None:
    """Ids of the subtasks and EOS, as they are trained."""
    texts, room = [str(sample.get("text", "")) for sample in samples], config.objective.text_tokens
    for text in texts:
        check_subtask(text, config)
    if not room or not any("text" in sample for sample in samples):
        return None
    tokens, mask = np.zeros((len(texts), room), np.int32), np.zeros((len(texts), room), bool)
    for i, text in enumerate(texts):  # an empty one is masked: the same program
        ids = [*tokenizer.encode(text), tokenizer.eos_id] if text else []
        _cut.add(len(ids) > room)
        ids = [*ids[: room - 1], tokenizer.eos_id] if len(ids) > room else ids
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return Block(jnp.asarray(tokens), jnp.asarray(mask))


def check_subtask(text: str, config: PolicyConfig) -> None:
    """Raises UserError for a subtask, if the policy reads none."""
    if text and not config.objective.text_tokens:
        raise UserError(
            f"the observation has a subtask, {text[:80]!r}, and this policy reads none: it was trained with objective "
            f"{type(config.objective).__name__}, without text after the prompt."
        )
