"""Observations from which one thing was taken: what the policy does not miss, it does not use."""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pi0_jax.batch import Observation
from pi0_jax.data.transform import Transform
from pi0_jax.diagnose.frames import Chunks, encode


class Ablation(NamedTuple):
    """One thing that was taken, and the observations without it."""

    kind: str
    """instruction, camera or state."""
    name: str
    """Of the camera; the kind again for the others."""
    how: str
    observation: Observation


def ablations(
    chunks: Chunks, transform: Transform, tasks: Sequence[str], *, sees_state: bool, rng: np.random.Generator
) -> Iterator[Ablation]:
    """Everything that can be taken from these chunks' observations; `why_not` has the rest.

    Args:
        chunks: of held-out episodes.
        transform: to the model's arrays.
        tasks: instructions of the datasets.
        sees_state: whether the policy is given the state.
        rng: chooses instructions and states.
    """
    seen = chunks.observation
    if _tasks(tasks):
        prompts = swapped(chunks, _tasks(tasks), rng)
        yield Ablation(
            "instruction", "instruction", "another one of the dataset", _with(seen, transform, chunks, prompts)
        )
    first = np.searchsorted(chunks.episode, np.arange(len(chunks.lengths)))[chunks.episode]
    for camera, images in seen.images.items():
        if not np.any(seen.image_masks[camera]):
            continue
        for how, pictures in (("black", np.zeros_like(images)), ("frozen at the episode's first frame", images[first])):
            yield Ablation("camera", camera, how, seen._replace(images={**seen.images, camera: pictures}))
    if sees_state and len(chunks.lengths) > 1:
        state = chunks.state[shuffled(chunks.episode, rng)]
        observation = _with(seen, transform, chunks._replace(state=state), chunks.prompts)
        yield Ablation("state", "state", "that of another episode", observation)


def why_not(chunks: Chunks, tasks: Sequence[str], *, sees_state: bool) -> dict[str, str]:
    """What cannot be taken, by kind, and why; arguments as of `ablations`."""
    reasons = {}
    if not _tasks(tasks):
        words = any(task.strip() for task in tasks)
        reasons["instruction"] = "the data have one instruction alone" if words else "the data have no instructions"
    if not chunks.observation.images:
        reasons["camera"] = "the policy has no camera"
    if not sees_state:
        reasons["state"] = "the policy is not given the state"
    elif len(chunks.lengths) < 2:
        reasons["state"] = "there is one episode alone"
    return reasons


def swapped(chunks: Chunks, tasks: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """For every chunk another instruction than its own, one per episode and instruction."""
    prompts = chunks.prompts.copy()
    for episode in range(len(chunks.lengths)):
        rows = np.flatnonzero(chunks.episode == episode)
        for own in set(chunks.prompts[rows]):
            others = [task for task in tasks if task != own]
            prompts[rows[chunks.prompts[rows] == own]] = others[rng.integers(len(others))]
    return prompts


def shuffled(episode: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For every chunk the number of one of another episode."""
    return np.array([rng.choice(np.flatnonzero(episode != own)) for own in episode])


def _tasks(tasks: Sequence[str]) -> list[str]:
    """Different instructions with words, if there are at least two."""
    found = sorted({task for task in tasks if task.strip()})
    return found if len(found) > 1 else []


def _with(seen: Observation, transform: Transform, chunks: Chunks, prompts: np.ndarray) -> Observation:
    """The observations with other states or instructions."""
    sample = encode(transform, chunks.state, prompts)
    return seen._replace(state=sample["state"], prompt=sample["prompt"], prompt_mask=sample["prompt_mask"])
