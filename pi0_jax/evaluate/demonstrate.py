"""One demonstration of a simulator's scripted expert. Runs where the simulator does, so it needs numpy alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pi0_jax.data.raw import RawObservation
from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators import MAX_ATTEMPTS
from pi0_jax.evaluate.simulators.gym import Episode, Simulator

STATE, ACTION, VALID = "observation.state", "action", "valid"
"""Features of a dataset; `pi0_jax.data.source` has the same."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Bursts of random motion while the expert acts, so that the data shows how to recover."""

    rate: float = 0.08
    """Chance that a burst starts at a step."""
    max_steps: int = 3
    """A burst repeats one random action for 1 to this many steps."""


class Demonstration(NamedTuple):
    """One successful episode of T steps."""

    frames: dict[str, np.ndarray]
    """Arrays of T rows by feature name: what was observed, the action executed there, and `valid`: 1 where that action
    is the expert's, 0 where a burst replaced it. What follows a burst cannot be foreseen from before it, so a chunk of
    actions should count up to its first invalid step."""
    task: str
    prompt: str
    seed: int
    """Seed of the layout."""
    dropped: int
    """Failed attempts before this one."""
    mode: str | None = None
    """Which of the simulator's `modes` it took."""
    subtasks: tuple[str, ...] = ()
    """The expert's subtask at each step; empty where the simulator has none."""


def demonstrate(
    simulator: Simulator, number: int, seed: int, split: str, noise: Noise, cameras: dict[str, str]
) -> Demonstration:
    """Demonstration `number` of a split: the first successful attempt at it. `cameras` are those of the robot: feature
    of the dataset → camera.

    Raises:
        UserError: the simulator has no expert, or the expert always fails.
    """
    for attempt in range(MAX_ATTEMPTS):
        episode = simulator.start(number, seed, split, attempt)
        frames, prompt, subtasks = _run(episode, noise, cameras)
        episode.close()
        if frames is not None:
            return Demonstration(frames, episode.task, prompt, episode.seed, attempt, episode.mode, subtasks)
    raise UserError(
        f"the expert failed {MAX_ATTEMPTS} times at episode {number} under {noise}: the bursts leave it no time to "
        "finish. Lower their rate or length."
    )


def _run(episode: Episode, noise: Noise, cameras: dict[str, str]) -> tuple[dict[str, Any] | None, str, tuple[str, ...]]:
    """Runs the expert to the end of an episode: the frames, None if it fails, the instruction, and subtasks."""
    rng, rows, over, success = np.random.default_rng((episode.seed, 1)), [], False, False
    prompt, burst, burst_left, subtasks = "", np.empty(0), 0, []
    while not over:
        raw = episode.observe()
        prompt = prompt or raw["prompt"]
        if burst_left == 0 and rng.random() < noise.rate:
            burst, burst_left = episode.random_action(rng), int(rng.integers(1, noise.max_steps + 1))
        valid = burst_left == 0
        action = np.asarray(episode.expert() if valid else burst, np.float32)
        burst_left = max(burst_left - 1, 0)
        rows.append(frame(raw, action, cameras) | {VALID: np.array([valid], np.float32)})
        subtasks += [] if (subtask := episode.subtask()) is None else [subtask]
        over, success = episode.step(action)
    return (stack(rows) if success else None), prompt, tuple(subtasks)


def frame(raw: RawObservation, action: np.ndarray, cameras: Mapping[str, str]) -> dict[str, np.ndarray]:
    """One row of a recording: what was observed, by feature, and the action executed there."""
    images = {feature: raw["images"][camera] for feature, camera in cameras.items()}
    return {**images, STATE: np.asarray(raw["state"], np.float32), ACTION: np.asarray(action, np.float32)}


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """An episode's rows as arrays by feature name."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
