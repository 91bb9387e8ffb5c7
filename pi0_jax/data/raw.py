"""What a policy is asked with. Simulators import it in interpreters that have neither this package nor JAX."""

from __future__ import annotations

from typing import TypedDict

import numpy as np


class _Optional(TypedDict, total=False):
    previous: np.ndarray
    """What remains of the chunk in execution, `[n, d]`, for a new chunk that continues it."""
    delay: int
    """How many actions of `previous` will be executed before the new chunk can be."""
    subtask: str
    """What to do first, for a policy that was trained on subtasks: the fixed one, or that of an earlier chunk; empty is
    none."""


class RawObservation(_Optional):
    """What a robot sees, in its own units."""

    images: dict[str, np.ndarray]
    """By camera of the model, RGB `[h, w, 3]`: uint8, or float in [0, 1]."""
    state: np.ndarray
    """`[d]`."""
    prompt: str
    """The instruction."""
