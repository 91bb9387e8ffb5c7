"""Times that a solver stops at, from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pi0_jax.errors import UserError


class Grid(NamedTuple):
    """Steps of a solver."""

    times: Float[np.ndarray, "n+1"]
    """From 1 to 0, float32."""
    dt: Float[np.ndarray, "n"]
    """Change of time per step, negative, float32."""


def euler_grid(num_steps: int) -> Grid:
    """Equal steps, whose times are accumulated (t + dt) in float32 as openpi's are.

    1 + i · dt, as LeRobot has it, differs by 1e-7, which the time embedding's shortest period turns into 2e-4.
    """
    dt = np.full(num_steps, -1.0 / num_steps, np.float32)
    times = np.add.accumulate(np.concatenate([np.ones(1, np.float32), dt]), dtype=np.float32)
    times[-1] = 0.0
    return Grid(times, dt)


def power_grid(num_steps: int, power: float = 1.0) -> Grid:
    """Times (1 - i / num_steps) ** power.

    Args:
        num_steps: number of steps; the grid has one time more.
        power: 1 is `euler_grid`; larger values put more of the steps near the data, smaller ones near the noise.

    Raises:
        UserError: fewer than one step, or a power that is not positive.
    """
    if num_steps < 1 or not power > 0:
        raise UserError(
            f"a grid of num_steps {num_steps} with grid_power {power}; a solver needs at least 1 step and a "
            "positive power."
        )
    return euler_grid(num_steps) if power == 1 else grid_of((1 - np.arange(num_steps + 1) / num_steps) ** power)


def grid_of(times: Sequence[float | int] | Float[np.ndarray, "n"]) -> Grid:
    """Grid of given times.

    Raises:
        UserError: the times do not fall strictly from 1 to 0.
    """
    grid = np.asarray(times, np.float32)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not (np.diff(grid) < 0).all():
        raise UserError(f"the grid {list(times)} has to fall strictly from 1 (noise) to 0 (data).")
    return Grid(grid, np.diff(grid))
