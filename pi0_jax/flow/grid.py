"""Times that a solver stops at, from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def warped_grid(num_steps: int, power: float = 1.0) -> Float[Array, "n"]:
    """(1 - i / num_steps) ** power for i = 0 … num_steps.

    Args:
        num_steps: number of steps; the grid has one time more.
        power: 1 is uniform; larger values put more of the steps near the data, smaller ones near the noise.

    Raises:
        ValueError: fewer than one step, or a power that is not positive.
    """
    if num_steps < 1 or not power > 0:
        raise ValueError(f"a grid of {num_steps} steps with power {power}; both have to be positive.")
    return jnp.asarray((1 - np.arange(num_steps + 1) / num_steps) ** power, jnp.float32)


def given_grid(times: Sequence[float]) -> Float[Array, "n"]:
    """A grid that a user wrote down.

    Raises:
        ValueError: the times do not fall strictly from 1 to 0.
    """
    grid = np.asarray(times, np.float32)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not (np.diff(grid) < 0).all():
        raise ValueError(f"the grid {list(times)} has to fall strictly from 1 (noise) to 0 (data).")
    return jnp.asarray(grid)
