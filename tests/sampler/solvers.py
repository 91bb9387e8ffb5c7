"""All solvers, as the folder lists them."""

import dataclasses

from pi0_jax.sampler import SAMPLERS, Solver

SOLVERS = {name: kind for name, kind in SAMPLERS.items() if issubclass(kind, Solver)}


def make(name: str, num_steps: int, grid_power: float = 1.0) -> Solver:
    """A solver that does nothing but solve: no clip, no noise."""
    plain = {"clip": None} if "clip" in {field.name for field in dataclasses.fields(SOLVERS[name])} else {}
    return SOLVERS[name](num_steps, grid_power, **plain)
