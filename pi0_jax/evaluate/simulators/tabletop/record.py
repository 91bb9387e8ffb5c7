"""Records demonstrations of the scripted expert as a LeRobot dataset, on all cores and reproducibly."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pi0_jax.evaluate.simulators.tabletop.expert import expert_action
from pi0_jax.evaluate.simulators.tabletop.scene import CONTROL_HZ, MAX_ACTION
from pi0_jax.evaluate.simulators.tabletop.tabletop import CAMERAS, TabletopEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import EPISODES_PER_SEED, SUITES, Task, episode_seed

MAX_ATTEMPTS = 10
BLOCK = 128
"""Episodes handed to the worker processes at a time, which bounds what waits in memory."""
MIN_SHARE = 16
"""Episodes that make another worker process worth its start."""
AXES = ["x", "y", "z"]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Bursts of random motion while the expert acts, so that the data shows how to recover."""

    rate: float = 0.08
    """Chance that a burst starts at a step."""
    max_steps: int = 3
    """A burst holds one random action, uniform over all actions, for 1 to this many steps."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One successful episode of T steps."""

    frames: dict[str, np.ndarray]
    """Arrays of T rows by feature name: what was observed, the action executed there, and `valid`: 1 where that action
    is the expert's, 0 where a burst replaced it. What follows a burst cannot be foreseen from before it, so a chunk of
    actions should count up to its first invalid step."""
    task: str
    """Name of the task."""
    prompt: str
    seed: int
    dropped: int
    """Failed attempts before this one."""


def demonstrate(env: TabletopEnv, task: Task, seed: int, noise: Noise) -> Demonstration | None:
    """Runs the expert once from the layout of `seed`; None if it fails."""
    rng = np.random.default_rng((seed, 1))
    observation, _ = env.reset(seed=seed, options={"task": task})
    rows: list[dict[str, np.ndarray]] = []
    burst, burst_left = np.zeros(3, np.float32), 0
    terminated = truncated = False
    while not (terminated or truncated):
        if burst_left == 0 and rng.random() < noise.rate:
            burst = rng.uniform(-MAX_ACTION, MAX_ACTION, 3).astype(np.float32)
            burst_left = int(rng.integers(1, noise.max_steps + 1))
        valid = burst_left == 0
        action = expert_action(task, env.snapshot()) if valid else burst
        burst_left = max(burst_left - 1, 0)
        rows.append(
            {f"observation.images.{camera}": observation["images"][camera] for camera in CAMERAS}
            | {"observation.state": observation["state"], "action": action, "valid": np.array([valid], np.float32)}
        )
        observation, _, terminated, truncated, _ = env.step(action)
    if not terminated:
        return None
    frames = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Demonstration(frames, task.name, env.prompt, seed, dropped=0)


@functools.cache
def _worker_env(image_size: int) -> TabletopEnv:
    return TabletopEnv(image_size=image_size)


def _collect(number: int, split: str, seed: int, image_size: int, noise: Noise, env: str) -> Demonstration:
    """Episode `number` of the recording: the first successful one of its own seeds."""
    for attempt in range(MAX_ATTEMPTS):
        layout = episode_seed(split, attempt * (EPISODES_PER_SEED // MAX_ATTEMPTS) + number, seed)
        task = SUITES[env][number % len(SUITES[env])]
        episode = demonstrate(_worker_env(image_size), task, layout, noise)
        if episode is not None:
            return dataclasses.replace(episode, dropped=attempt)
    raise RuntimeError(
        f"the expert failed {MAX_ATTEMPTS} times at episode {number} under {noise}: the bursts leave it no time to "
        "finish. Lower their rate or length."
    )


def demonstrations(
    num_episodes: int,
    split: str = "train",
    seed: int = 0,
    image_size: int = 48,
    noise: Noise = Noise(),
    workers: int | None = None,
    env: str = "tabletop",
) -> Iterator[Demonstration]:
    """Successful episodes, the tasks of `env` in turn. They depend on all arguments but `workers`.

    With more than one worker a script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
        num_episodes: at most 100,000.
        split: "train" or "validation". Evaluation layouts are refused: nobody should train on them.
        seed: other seeds give other episodes of the split.
        image_size: side of the images, pixels.
        noise: the bursts.
        workers: processes; None means one a core.
        env: whose tasks, one of `SUITES`.

    Raises:
        ValueError: if `num_episodes`, `split`, `seed` or `env` is out of range.
    """
    if env not in SUITES:
        raise ValueError(f"env is {env!r}; demonstrations are recorded in {' or '.join(SUITES)}.")
    if split not in ("train", "validation"):
        raise ValueError(f'split is {split!r}; demonstrations are recorded for "train" or "validation".')
    limit = EPISODES_PER_SEED // MAX_ATTEMPTS
    if not 0 < num_episodes <= limit:
        raise ValueError(f"num_episodes is {num_episodes}; expected 1 to {limit}. Record more under another seed.")
    collect = functools.partial(_collect, split=split, seed=seed, image_size=image_size, noise=noise, env=env)
    workers = min(workers or os.cpu_count() or 1, -(-num_episodes // MIN_SHARE))
    if workers == 1:
        yield from map(collect, range(num_episodes))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for start in range(0, num_episodes, BLOCK):
            yield from pool.map(collect, range(start, min(start + BLOCK, num_episodes)), chunksize=4)


def features(image_size: int) -> dict[str, dict]:
    """The dataset's columns in LeRobot's terms."""
    image = {"dtype": "video", "shape": (image_size, image_size, 3), "names": ["height", "width", "channels"]}
    state = [f"{source}_{axis}" for source in ("tool", "command") for axis in AXES]
    return {f"observation.images.{camera}": image for camera in CAMERAS} | {
        "observation.state": {"dtype": "float32", "shape": (6,), "names": state},
        "action": {"dtype": "float32", "shape": (3,), "names": AXES},
        "valid": {"dtype": "float32", "shape": (1,), "names": ["valid"]},
    }


def record(
    root: str | Path,
    num_episodes: int = 1000,
    split: str = "train",
    seed: int = 0,
    image_size: int = 48,
    noise: Noise = Noise(),
    workers: int | None = None,
    overwrite: bool = False,
    env: str = "tabletop",
) -> dict:
    """Writes `demonstrations(...)` to `root` as a LeRobot dataset, and how they came about to `meta/recording.json`.

    Returns:
        The content of `meta/recording.json`: the arguments, `frames`, `dropped` (failed attempts, left out of the
        dataset), and for each episode its task's name and its layout's seed.
    """
    from pi0_jax.data.lerobot import (
        LeRobotWriter,  # here, so that worker processes start without video and parquet
    )

    episodes = []
    frames = dropped = 0
    found = demonstrations(num_episodes, split, seed, image_size, noise, workers, env)
    columns = features(image_size)
    with LeRobotWriter(root, fps=CONTROL_HZ, robot_type="tabletop", features=columns, overwrite=overwrite) as writer:
        for episode in tqdm(found, total=num_episodes, desc=f"recording {split}", unit="episode"):
            writer.add_episode(episode.frames, task=episode.prompt)
            episodes.append({"task": episode.task, "seed": episode.seed})
            frames += len(episode.frames["action"])
            dropped += episode.dropped
    summary = {
        "split": split,
        "seed": seed,
        "noise": dataclasses.asdict(noise),
        "image_size": image_size,
        "frames": frames,
        "dropped": dropped,
        "episodes": episodes,
    }
    (Path(root) / "meta" / "recording.json").write_text(json.dumps(summary, indent=1))
    return summary
