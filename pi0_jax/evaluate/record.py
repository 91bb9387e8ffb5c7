"""Records demonstrations of a simulator's scripted expert as a LeRobot dataset, on all cores and reproducibly."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pi0_jax.data.pool import run_tasks
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.data.source import ACTION, STATE, VALID
from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators import MAX_ATTEMPTS, MAX_DEMONSTRATIONS, get_simulator
from pi0_jax.evaluate.simulators.gym import Episode, Simulator

BLOCK = 512
"""Episodes per round of worker processes, which bounds how many wait in memory."""
MIN_SHARE = 16
"""Episodes that make another worker process worth its start."""


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


@dataclasses.dataclass(frozen=True)
class Source:
    """Which demonstrations to record; equal sources give equal demonstrations."""

    simulator: str
    """Name of a simulator that has a scripted expert."""
    split: str = "train"
    """"train" or "validation". Evaluation layouts are refused: nobody should train on them."""
    seed: int = 0
    """Other seeds give other episodes of the split."""
    noise: Noise = Noise()
    options: tuple[tuple[str, Any], ...] = ()
    """Options of the simulator."""

    def __post_init__(self):
        if self.split not in ("train", "validation"):
            raise UserError(f'split is {self.split!r}; demonstrations are recorded for "train" or "validation".')


def _demonstrate(episode: Episode, robot: Robot, noise: Noise, dropped: int) -> Demonstration | None:
    """Runs the expert to the end of an episode; None if it fails."""
    rng, rows, over, success = np.random.default_rng((episode.seed, 1)), [], False, False
    prompt, burst, burst_left = "", np.empty(0), 0
    while not over:
        raw = episode.observe()
        prompt = prompt or raw["prompt"]
        if burst_left == 0 and rng.random() < noise.rate:
            burst, burst_left = episode.random_action(rng), int(rng.integers(1, noise.max_steps + 1))
        valid = burst_left == 0
        action = episode.expert() if valid else burst
        burst_left = max(burst_left - 1, 0)
        row = {feature: raw["images"][camera] for feature, camera in robot.cameras.items()}
        rows.append(row | {STATE: raw["state"], ACTION: action, VALID: np.array([valid], np.float32)})
        over, success = episode.step(action)
    frames = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Demonstration(frames, episode.task, prompt, episode.seed, dropped, episode.mode) if success else None


@functools.cache
def _simulator(name: str, options: tuple[tuple[str, Any], ...]) -> Simulator:
    return get_simulator(name, **dict(options))


def _collect(number: int, source: Source) -> Demonstration:
    """Demonstration `number`: the first successful attempt at it."""
    simulator = _simulator(source.simulator, source.options)
    for attempt in range(MAX_ATTEMPTS):
        episode = simulator.start(number, source.seed, source.split, attempt)
        demonstration = _demonstrate(episode, get_robot(simulator.robot), source.noise, dropped=attempt)
        episode.close()
        if demonstration is not None:
            return demonstration
    raise UserError(
        f"the expert failed {MAX_ATTEMPTS} times at episode {number} under {source.noise}: the bursts leave it no time "
        "to finish. Lower their rate or length."
    )


def demonstrations(source: Source, num_episodes: int, workers: int | None = None) -> Iterator[Demonstration]:
    """The first demonstrations of a source, the simulator's tasks in turn.

    With more than one worker a script that calls this needs the usual `if __name__ == "__main__":`. `num_episodes` is
    at most `MAX_DEMONSTRATIONS`. `workers` are processes, None: one per core; they change nothing in the result.

    Raises:
        UserError: no such simulator, or it has no expert, or `num_episodes` is out of range.
    """
    if not 0 < num_episodes <= MAX_DEMONSTRATIONS:
        raise UserError(
            f"num_episodes is {num_episodes}; expected 1 to {MAX_DEMONSTRATIONS}. Record more under another seed."
        )
    _simulator(source.simulator, source.options)  # fails here rather than in a worker
    collect = functools.partial(_collect, source=source)
    workers = min(workers or os.cpu_count() or 1, -(-num_episodes // MIN_SHARE))
    for start in range(0, num_episodes, BLOCK):
        tasks = [(number,) for number in range(start, min(start + BLOCK, num_episodes))]
        yield from run_tasks(collect, tasks, workers)


def features(demonstration: Demonstration, robot: Robot) -> dict[str, dict[str, Any]]:
    """The dataset's columns in LeRobot's terms."""
    names = {STATE: [*robot.state], ACTION: [*robot.actions], VALID: [VALID]}
    names |= {camera: ["height", "width", "channels"] for camera in robot.cameras}
    return {
        name: {"dtype": "video" if name in robot.cameras else str(x.dtype), "shape": x.shape[1:], "names": names[name]}
        for name, x in demonstration.frames.items()
    }


def record(
    root: str | Path, source: Source, num_episodes: int = 1000, workers: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes `demonstrations(...)` to `root` as a LeRobot dataset, and how they came about to `meta/recording.json`.

    Returns:
        The content of `meta/recording.json`: the source's fields, `frames`, `dropped` (failed attempts, left out of
        the dataset), and for each episode its task's name, its layout's seed,
        and its mode, where there are several.
    """
    # Here, so that worker processes start without video and parquet.
    from pi0_jax.data.lerobot import LeRobotWriter

    simulator = _simulator(source.simulator, source.options)
    robot = get_robot(simulator.robot)
    found = demonstrations(source, num_episodes, workers)
    first = next(found)
    columns = features(first, robot)
    episodes, frames, dropped = [], 0, 0
    with LeRobotWriter(root, simulator.fps, robot_type=robot.name, features=columns, overwrite=overwrite) as writer:
        found = tqdm(itertools.chain([first], found), f"recording {source.split}", num_episodes, unit="episode")
        for episode in found:
            writer.add_episode(episode.frames, task=episode.prompt)
            mode = {} if episode.mode is None else {"mode": episode.mode}
            episodes.append({"task": episode.task, "seed": episode.seed, **mode})
            frames += len(episode.frames["action"])
            dropped += episode.dropped
    summary = dataclasses.asdict(source) | {"frames": frames, "dropped": dropped, "episodes": episodes}
    (Path(root) / "meta" / "recording.json").write_text(json.dumps(summary, indent=1))
    return summary
