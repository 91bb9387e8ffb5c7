"""The tasks: what is asked, when it is done, and which seeds each use of them draws from.

Six are what policies are trained on; three more, of another kind, are there to be learned after them.

Lengths are metres. The table's centre is the origin, x points right and y up in the images of the straight-down
cameras, z is the height above the table. No instruction says left or right, since training mirrors the scene.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from pi0_jax.errors import UserError

OBJECTS = ("red block", "green puck", "blue ball")
GOAL_RADIUS = 0.06
"""Radius of the yellow circle; a push is done when the object's centre is over it."""
REACH_RADIUS = 0.04
"""Largest distance of the object from the ring's axis in a successful reach."""
REACH_HEIGHT = 0.02
"""Largest height of the ring in a successful reach."""

PHRASINGS = {
    "reach": (
        "reach the {}",
        "lower the ring over the {}",
        "move to the {}",
        "put the ring around the {}",
        "go down to the {}",
    ),
    "push": (
        "push the {} onto the yellow circle",
        "move the {} to the yellow circle",
        "drag the {} onto the yellow circle",
        "bring the {} to the yellow circle",
        "slide the {} to the yellow circle",
    ),
    "centre": tuple(f"{verb} the {{}} to the centre" for verb in ("push", "move", "drag", "bring", "slide")),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to do, and the sentences that ask for it."""

    kind: Literal["reach", "push", "centre"]
    object: str
    """One of `OBJECTS`."""

    @property
    def name(self) -> str:
        """Stable name for reports, such as "reach_red_block"."""
        return f"{self.kind}_{self.object.replace(' ', '_')}"

    @property
    def prompts(self) -> tuple[str, ...]:
        """All phrasings of the instruction."""
        return tuple(phrasing.format(self.object) for phrasing in PHRASINGS[self.kind])


TASKS = tuple(Task(kind, name) for kind in ("reach", "push") for name in OBJECTS)
TASK_SETS = {"objects": TASKS, "centre": tuple(Task("centre", name) for name in OBJECTS)}
"""Tasks that are recorded and evaluated together. The centre is the table's, where nothing is drawn."""


def find_task(name: str) -> Task:
    """The task of that name; `UserError` if there is none."""
    tasks = [task for group in TASK_SETS.values() for task in group]
    for task in tasks:
        if task.name == name:
            return task
    raise UserError(f"no task is named {name!r}; the tasks are {', '.join(task.name for task in tasks)}.")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The simulator's true state at one moment: for scoring and the scripted expert, never for the policy."""

    tool: np.ndarray
    """Position of the ring: its axis in x and y, the lower end of its posts in z. Shape [3]."""
    command: np.ndarray
    """Position that the ring is told to take. Shape [3]."""
    objects: dict[str, np.ndarray]
    """Centre of each of `OBJECTS`. Shape [2]."""
    goal: np.ndarray
    """Centre of the yellow circle. Shape [2]."""


def is_done(task: Task, snapshot: Snapshot) -> bool:
    """Whether `task` is accomplished at this moment: object in the lowered ring, over the yellow circle, or both in the
    lowered ring and within the circle's radius of the table's centre (so that no layout is done from the start)."""
    position = snapshot.objects[task.object]
    if task.kind == "push":
        return bool(np.linalg.norm(position - snapshot.goal) < GOAL_RADIUS)
    if task.kind == "centre" and np.linalg.norm(position) >= GOAL_RADIUS:
        return False
    lowered = snapshot.tool[2] < REACH_HEIGHT
    return bool(lowered and np.linalg.norm(position - snapshot.tool[:2]) < REACH_RADIUS)


SPLITS = ("train", "validation", "evaluation")
SEEDS_PER_SPLIT = 1_000_000
EPISODES_PER_SEED = 1_000_000


def episode_seed(split: str, index: int, seed: int = 0) -> int:
    """Seed of one episode's layout, different for every (split, seed, index).

    Each of the `SPLITS` owns a range of its own, so no evaluation layout is ever trained on. `index` and the user's
    `seed` are 0 to 999999.

    Raises:
        UserError: if an argument is out of range.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}.")
    for name, value, limit in (("seed", seed, SEEDS_PER_SPLIT), ("index", index, EPISODES_PER_SEED)):
        if not 0 <= value < limit:
            raise UserError(f"{name} is {value}; expected 0 <= {name} < {limit}, so that splits never overlap.")
    return (SPLITS.index(split) * SEEDS_PER_SPLIT + seed) * EPISODES_PER_SEED + index
