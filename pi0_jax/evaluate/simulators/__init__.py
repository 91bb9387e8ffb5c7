"""Simulators to evaluate in: one module or package each in this folder, or a file of one's own.

The module `NAME.py` of the simulator NAME defines two things, and imports what not everyone has inside `make`:

    ROBOT = "aloha"                                   # name of its robot in `pi0_jax.data.robots`

    def make(*, camera: str = "top") -> Simulator:    # the keywords are its options: --env-options camera=side
        ...

and a third if its packages cannot be installed beside everybody else's; `pi0 env install NAME` does that:

    PACKAGES = ("gym-aloha==0.1.5",)                  # what pip installs, the simulator's own first

Such a module runs in another interpreter, which may have neither JAX nor pi0_jax: beside its packages it imports numpy,
`pi0_jax.evaluate.simulators`, `pi0_jax.data.raw` and `pi0_jax.errors` alone.

An option `counterfactual` (the instruction asks for something else than what is scored) is a control of language
grounding, which `pi0 report` then runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import runpy
from pathlib import Path
from typing import Any

from pi0_jax.errors import UserError, did_you_mean
from pi0_jax.evaluate.simulators.gym import Simulator

MAX_DEMONSTRATIONS, MAX_ATTEMPTS = 100_000, 10
"""Demonstrations per seed of a split, and layouts for each of them, until the expert succeeds in one."""


def simulator_names() -> list[str]:
    """Names of the simulators in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "gym")


def get_simulator(name: str, **options: Any) -> Simulator:
    """The simulator of that name, or of that Python file.

    Raises:
        UserError: there is none, it has no such option, or its packages are not installed.
    """
    make = _load(name)["make"]
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has no options"
            raise UserError(f"the simulator {name} has no option {option!r}; it {has}.{did_you_mean(option, known)}")
    return dataclasses.replace(make(**options), name=Path(name).stem)


def locate(name: str) -> str:
    """The file of a simulator that is one file, which processes find by its path; else its name."""
    files = [Path(folder) / f"{name}.py" for folder in __path__]
    return next((str(file) for file in files if file.is_file()), name)


def packages(name: str) -> tuple[str, ...]:
    """What the simulator of that name needs to have installed; empty where it does not say so."""
    return _load(name).get("PACKAGES", ())


def has_option(name: str, option: str) -> bool:
    """Whether the simulator of that name has an option."""
    return option in inspect.signature(_load(name)["make"]).parameters


def find_simulator(robot: str) -> str:
    """Name of the first simulator of a robot; `UserError` if there is none."""
    for name in simulator_names():
        if robot == _load(name)["ROBOT"]:
            return name
    raise UserError(
        f"there is no simulator of the robot {robot!r}; name one with --env: {_choices()}. `pi0 diagnose RUN` needs "
        "none: it takes held-out episodes."
    )


def _choices() -> str:
    return f"{', '.join(simulator_names())}, or a Python file (pi0_jax.evaluate.simulators)"


def _load(name: str) -> dict[str, Any]:
    """What the module of a simulator defines."""
    if name in simulator_names():
        return vars(importlib.import_module(f"{__name__}.{name}"))
    if not name.endswith(".py"):
        hint = did_you_mean(name, simulator_names())
        raise UserError(f"there is no simulator {name!r}; there are {_choices()}.{hint}")
    if not Path(name).is_file():
        raise UserError(f"there is no file {name}; --env takes {_choices()}.")
    module = runpy.run_path(name)
    if missing := sorted({"ROBOT", "make"} - set(module)):
        raise UserError(f"{name} defines no {' and no '.join(missing)}; see pi0_jax.evaluate.simulators.")
    return module
