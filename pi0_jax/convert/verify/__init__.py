"""Comparisons of conversions with the frameworks that checkpoints come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pi0_jax.config import ModelConfig

Inputs = dict[str, np.ndarray]
"""images/<i> `[b y x 3]` in [-1, 1] and image_masks/<i> `[b]` for the i-th camera, tokens and token_mask `[b p]`, state
`[b ad]`, noise `[b ah ad]`."""

Stages = dict[str, Any]
"""What a network computed on the way, as `agree.valid_stages` takes it."""


class Runner(NamedTuple):
    """Runs checkpoints in the framework that they are from, where it is installed."""

    title: str
    """Name of the framework, for people."""
    check_installed: Callable[[], None]
    """Raises UserError, with what to install, where something is missing."""
    times: Callable[[int], tuple[float, ...]]
    """Flow times at which the framework evaluates the velocity, from the number of Euler steps."""
    run: Callable[[Path, ModelConfig, Inputs, int], tuple[np.ndarray, Stages]]
    """Loads a folder strictly and samples from the noise in float32, in that many steps: actions `[b ah ad]`, and the
    stages of the first step. Raises UserError where tensors are missing or unexpected."""
