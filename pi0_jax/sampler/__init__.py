"""From noise, or from a prefix, to actions. Each solver is a file of this folder, and is found by listing it."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import TYPE_CHECKING, Union

from pi0_jax.sampler.decoding import Categorical, Decoder, Greedy
from pi0_jax.sampler.runge_kutta import Euler
from pi0_jax.sampler.solver import Flow, Solver, integrate, trajectory

__all__ = [
    "SAMPLERS",
    "Categorical",
    "Decoder",
    "Euler",
    "Flow",
    "Greedy",
    "Sampler",
    "Solver",
    "integrate",
    "trajectory",
]

_modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

SAMPLERS: dict[str, type] = {
    name: kind
    for module in _modules
    for name, kind in vars(module).items()
    if dataclasses.is_dataclass(kind)
    and isinstance(kind, type)
    and kind.__module__ == module.__name__
    and issubclass(kind, Decoder | Solver)
    and kind is not Decoder
    and (issubclass(kind, Decoder) or (kind.step is not Solver.step and name != "RungeKutta"))
}
"""Name to class, for configurations and the command line."""

if TYPE_CHECKING:
    Sampler = Solver | Decoder
else:
    Sampler = Union[tuple(SAMPLERS.values())]  # noqa: UP007
