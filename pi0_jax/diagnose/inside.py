"""What a policy's network has inside: features of pictures, and what its actions attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pi0_jax.batch import Observation, scale_images
from pi0_jax.diagnose.frames import in_batches
from pi0_jax.inference.policy import Policy
from pi0_jax.inference.shapes import prompt_lengths
from pi0_jax.model.attention import watch_attention
from pi0_jax.model.writer import Block
from pi0_jax.objective import SampleOptions

Sample = Callable[[Observation, Float[np.ndarray, "n ah ad"], str], Float[np.ndarray, "n ah ad"]]
"""Normalised chunks from observations, noise and the title of a progress bar."""


class Attention(NamedTuple):
    """Shares of the action tokens' attention in the first solver step: means over layers, heads and tokens."""

    cameras: dict[str, Float[np.ndarray, "n y x"]]
    """Of the patches of each camera's picture."""
    prompt: Float[np.ndarray, "n"]
    """Of the instruction, and of π0.5's state, which is in the prompt."""
    own: Float[np.ndarray, "n"]
    """Of the action tokens themselves, and π0's state."""
    subtask: Float[np.ndarray, "n"] | None = None
    """Of the subtask that the policy wrote; None: it writes none."""
    written: list[str] | None = None
    """The subtasks."""


def sampled(policy: Policy, batch_size: int, seed: int) -> Sample:
    """The policy's chunks, a batch at a time; the same noise gives the same chunks."""

    def sample(observation: Observation, noise: np.ndarray, title: str) -> np.ndarray:
        keys = jax.random.split(jax.random.key(seed), len(noise))
        chunks = in_batches(lambda *inputs: policy.sample(*inputs)[0], batch_size, title)
        return chunks(_shortened(policy, observation), keys, noise)

    return sample


def written(policy: Policy, observation: Observation, noise: Float[np.ndarray, "n ah ad"], batch_size: int) -> Block:
    """The subtasks that a policy writes before it acts, a batch at a time."""

    def tokens(*inputs: Any) -> np.ndarray:
        _, text = policy.sample(*inputs)
        assert text is not None
        return np.where(text.mask, text.tokens, -1)

    keys = jax.random.split(jax.random.key(0), len(noise))
    found = in_batches(tokens, batch_size, "subtasks")(observation, keys, noise)
    return Block(jnp.maximum(found, 0), jnp.asarray(found >= 0))


def features(policy: Policy, batch_size: int) -> Callable[[Observation], Float[np.ndarray, "n f"]]:
    """The mean of each camera's image tokens as they enter the backbone, side by side; the state without cameras."""
    network, cameras = policy.sampler.objective.network, policy.sampler.model.cameras

    @jax.jit
    def mean_tokens(params: Any, observation: Observation) -> Array:
        tokens, _ = network.embed_prefix(params, scale_images(observation))
        length = tokens.shape[1] - observation.prompt.shape[1]
        means = [x.mean(1) for x in jnp.split(tokens[:, :length].astype(jnp.float32), len(cameras), axis=1)]
        return jnp.concatenate(means, axis=1)

    def found(observation: Observation) -> np.ndarray:
        if not cameras:
            return np.asarray(observation.state)
        observation = observation._replace(prompt=observation.prompt[:, :1], prompt_mask=observation.prompt_mask[:, :1])
        return in_batches(lambda x: mean_tokens(policy.sampler.params, x), batch_size, "features")(observation)

    return found


def attention(
    policy: Policy, observation: Observation, noise: Float[np.ndarray, "n ah ad"], batch_size: int
) -> Attention | None:
    """Where the action tokens look; None where the network's actions are no tokens, or its parameters not folded. A
    policy that writes subtasks acts by one that it writes for each observation, `batch_size` of them at a time."""
    model, flow_of = policy.sampler.model, policy.sampler.objective.flow
    if flow_of is None or not policy.sampler.folded:
        return None
    observation = _shortened(policy, observation)
    text = written(policy, observation, noise, batch_size) if policy.config.subtask_every else None

    def shares(params: Any, observation: Observation, noise: Array, text: Block | None) -> Array | None:
        flow, _ = flow_of(params, observation, SampleOptions(policy.config.sampler, text=text))
        with watch_attention() as weights:
            flow.predict(noise, jnp.float32(1.0))
        if not weights:
            return None
        tokens = noise.shape[1]
        means = [w.reshape(*w.shape[:2], -1, model.num_heads // w.shape[1], w.shape[-1]).mean((1, 3)) for w in weights]
        return jnp.mean(jnp.stack(means).astype(jnp.float32)[:, :, -tokens:], axis=(0, 2))

    found = jax.jit(shares)(policy.sampler.params, observation, jnp.asarray(noise), text)
    if found is None:
        return None
    side = model.vision.image_size // model.vision.patch_size
    room = 0 if text is None else text.tokens.shape[1]
    ends = np.cumsum([side * side] * len(model.cameras) + [observation.prompt.shape[1], room])
    *pictures, prompt, subtask, own = np.split(np.asarray(found), ends, axis=1)
    cameras = {name: x.reshape(-1, side, side) for name, x in zip(model.cameras, pictures, strict=True)}
    shown = Attention(cameras, prompt.sum(1), own.sum(1))
    if text is None:
        return shown
    words = [policy.tokenizer.decode(row[there].tolist()) for row, there in zip(*map(np.asarray, text), strict=True)]
    return shown._replace(subtask=subtask.sum(1), written=words)


def _shortened(policy: Policy, observation: Observation) -> Observation:
    """The observations with no more padding of prompts than the policy's programs have."""
    needed = int(np.asarray(observation.prompt_mask).sum(1).max())
    length = next(n for n in prompt_lengths(policy.config.model.prompt_length) if n >= needed)
    return observation._replace(prompt=observation.prompt[:, :length], prompt_mask=observation.prompt_mask[:, :length])
