"""Simulators to evaluate in: one module or package each in this folder, or a file of one's own.

The module `NAME.py` of the simulator NAME defines two things, and imports what not everyone has inside `make`:

    ROBOT = "aloha"                                   # name of its robot in `pi0_jax.data.robots`

    def make(*, camera: str = "top") -> Simulator:    # the keywords are its options: --env-options camera=side
        ...

`gym.GymSimulator` makes one of any Gymnasium environment. An option `counterfactual` (the instruction asks for
something else than what is scored) is a control of language grounding, which `pi0 report` then runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pi0_jax.data.robots import RawObservation
from pi0_jax.errors import UserError, did_you_mean

MAX_DEMONSTRATIONS, MAX_ATTEMPTS = 100_000, 10
"""Demonstrations per seed of a split, and layouts for each of them, until the expert succeeds in one."""


@runtime_checkable
class Episode(Protocol):
    """One running episode. `observe` is called only when the policy is asked, so that rendering costs little."""

    @property
    def task(self) -> str:
        """Name of the task that is scored."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the layout."""
        ...

    def observe(self) -> RawObservation:
        """The policy's raw observation."""
        ...

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        """Executes one action; returns whether the episode is over, and whether it succeeded."""
        ...

    def picture(self) -> np.ndarray:
        """A picture for people, uint8 `[h, w, 3]`."""
        ...

    def expert(self) -> np.ndarray:
        """The scripted expert's next action, for recording; `UserError` where there is no expert."""
        ...

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """An action drawn uniformly, for noise while recording."""
        ...

    def close(self) -> None:
        """Ends the episode; nothing else is called afterwards."""
        ...


@runtime_checkable
class Simulator(Protocol):
    """A simulator with its tasks."""

    @property
    def robot(self) -> str:
        """Name of the robot in `pi0_jax.data.robots`."""
        ...

    @property
    def fps(self) -> int:
        """Actions per second."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of reports; episode i is of task i modulo their number."""
        ...

    def start(self, index: int, seed: int, split: str = "evaluation", attempt: int = 0) -> Episode:
        """Begins an episode with a layout of its own.

        Args:
            index: number of the episode.
            seed: other seeds give other layouts.
            split: "train", "validation" or "evaluation", which share no layout.
            attempt: another layout for the same task.
        """
        ...


def simulator_names() -> list[str]:
    """Names of the simulators in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "gym")


def get_simulator(name: str, **options: Any) -> Simulator:
    """The simulator of that name, or of that Python file.

    Raises:
        UserError: there is none, it has no such option, or its packages are not installed.
    """
    make = _load(name).make
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has no options"
            raise UserError(f"the simulator {name} has no option {option!r}; it {has}.{did_you_mean(option, known)}")
    return make(**options)


def has_option(name: str, option: str) -> bool:
    """Whether the simulator of that name has an option."""
    return option in inspect.signature(_load(name).make).parameters


def find_simulator(robot: str) -> str:
    """Name of the first simulator of a robot; `UserError` if there is none."""
    for name in simulator_names():
        if robot == _load(name).ROBOT:
            return name
    raise UserError(f"there is no simulator of the robot {robot!r}; name one with --env: {_choices()}.")


def _choices() -> str:
    return f"{', '.join(simulator_names())}, or a Python file (pi0_jax.evaluate.simulators)"


def _load(name: str) -> ModuleType:
    if not name.endswith(".py"):
        if name in simulator_names():
            return importlib.import_module(f"{__name__}.{name}")
        raise UserError(
            f"there is no simulator {name!r}; there are {_choices()}.{did_you_mean(name, simulator_names())}"
        )
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise UserError(f"there is no file {name}; --env takes {_choices()}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := {"ROBOT", "make"} - set(vars(module)):
        raise UserError(f"{name} defines no {' and no '.join(sorted(missing))}; see pi0_jax.evaluate.simulators.")
    return module
