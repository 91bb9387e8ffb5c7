"""Explicit Runge-Kutta methods. One is a Butcher tableau (Hairer, Nørsett, Wanner, Solving ODEs I, II.1)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

from pi0_jax.flow.path import Chunk
from pi0_jax.sampler.solver import Flow, Solver, State, Step


class Tableau(NamedTuple):
    """Butcher tableau of an explicit method."""

    stages: tuple[tuple[float, ...], ...]
    """Row i: weights of the earlier slopes in stage i; its sum is the stage's time."""
    weights: tuple[float, ...]
    """Weights of the slopes in the step; they sum to 1."""


@dataclasses.dataclass(frozen=True)
class RungeKutta(Solver):
    """Base of the Runge-Kutta methods: as many evaluations per step as the tableau has stages."""

    tableau: ClassVar[Tableau]

    def step(self, flow: Flow, x: Chunk, step: Step, state: State) -> tuple[Chunk, State]:
        slopes = []
        for row in self.tableau.stages:
            point = x + sum(step.dt * a * k for a, k in zip(row, slopes, strict=True) if a)
            features = step.features if not any(row) else ()
            slopes.append(flow.velocity(point, step.time + step.dt * sum(row), *features))
        return x + sum(step.dt * b * k for b, k in zip(self.tableau.weights, slopes, strict=True) if b), state


@dataclasses.dataclass(frozen=True)
class Euler(RungeKutta):
    """Euler's method, of order 1: one evaluation per step. What the released π0 weights are sampled with."""

    tableau = Tableau(((),), (1.0,))


@dataclasses.dataclass(frozen=True)
class Midpoint(RungeKutta):
    """The midpoint method, of order 2: two evaluations per step."""

    tableau = Tableau(((), (0.5,)), (0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Heun(RungeKutta):
    """Heun's method, of order 2: two evaluations per step."""

    tableau = Tableau(((), (1.0,)), (0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical Runge-Kutta method, of order 4: four evaluations per step."""

    tableau = Tableau(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
