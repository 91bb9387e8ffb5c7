"""Errors of sampled chunks against held-out demonstrations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from pi0_jax.config import TrainConfig
from pi0_jax.data.loader import valid_steps
from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.robots import RawObservation, Robot
from pi0_jax.data.source import STATE
from pi0_jax.training.inputs import open_held_out


class HeldOut(NamedTuple):
    """Frames of held-out demonstrations, and what the expert did from there."""

    observations: list[RawObservation]
    expert: Float[np.ndarray, "b ah d"]
    """Robot units."""
    valid: Bool[np.ndarray, "b ah"]
    """False after the episode's end, and where the demonstration was disturbed on purpose."""

    def rms(self, difference: Float[np.ndarray, "b ah d"]) -> float:
        """Root mean square over the valid steps."""
        return float(np.sqrt(np.mean(np.square(difference)[self.valid])))


def held_out(train: TrainConfig | None, robot: Robot, count: int = 256) -> HeldOut | None:
    """Evenly spaced frames of a run's held-out demonstrations of a robot; None where there are none."""
    if train is None:
        return None
    try:
        datasets = [dataset for dataset in open_held_out(train.data, train.policy) if alike(dataset.robot, robot)]
    except FileNotFoundError:  # the run came from elsewhere
        return None
    frames = [
        np.flatnonzero(np.isin(p.source.episode_of(np.arange(p.source.num_frames)), p.held_out)) for p in datasets
    ]
    total = sum(map(len, frames))
    if total == 0:
        return None
    chosen = np.linspace(0, total - 1, min(count, total)).astype(int)
    begin = np.cumsum([0, *map(len, frames)])
    found = [
        _read(dataset, rows[chosen[(chosen >= start) & (chosen < start + len(rows))] - start], train)
        for dataset, rows, start in zip(datasets, frames, begin, strict=False)
    ]
    observations = [raw for each in found for raw in each.observations]
    expert, valid = np.concatenate([each.expert for each in found]), np.concatenate([each.valid for each in found])
    return HeldOut(observations, expert, valid)


def alike(one: Robot, other: Robot) -> bool:
    """Whether two descriptions are of one robot, whose dataset may have other names."""
    cameras = set(one.cameras.values()) == set(other.cameras.values())
    return cameras and (one.state, one.actions) == (other.state, other.actions)


def _read(dataset: OpenDataset, rows: np.ndarray, train: TrainConfig) -> HeldOut:
    source, horizon = dataset.source, train.policy.model.action_horizon
    expert, inside = source.chunk(rows, horizon)
    images = {camera: source.images(feature, rows) for feature, camera in dataset.robot.cameras.items()}
    state = source.columns(STATE)[rows]
    observations = [
        RawObservation(
            images={camera: pixels[i] for camera, pixels in images.items()}, state=state[i], prompt=source.task(row)
        )
        for i, row in enumerate(rows)
    ]
    return HeldOut(observations, expert, inside & valid_steps(source, rows, horizon))
