"""π0 and π0.5 vision-language-action policies in JAX: train, run, evaluate, convert.

Importing this package loads next to nothing; the public names below are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Batch": "batch",
    "Observation": "batch",
    "Gaussian": "config",
    "ModelConfig": "config",
    "PolicyConfig": "config",
    "TrainConfig": "config",
    "PI0": "config",
    "PI05": "config",
    "Policy": "inference.policy",
    "SampleOptions": "objective",
    "make_objective": "objective",
    "integrate": "sampler",
    "init_params": "pi0",
    "loss": "pi0",
    "sample_actions": "pi0",
}
"""Public name to the module that has it."""

__all__ = [
    "PI0",
    "PI05",
    "Batch",
    "Gaussian",
    "ModelConfig",
    "Observation",
    "Policy",
    "PolicyConfig",
    "SampleOptions",
    "TrainConfig",
    "init_params",
    "integrate",
    "loss",
    "make_objective",
    "sample_actions",
]

if TYPE_CHECKING:
    from pi0_jax.batch import Batch, Observation
    from pi0_jax.config import PI0, PI05, Gaussian, ModelConfig, PolicyConfig, TrainConfig
    from pi0_jax.inference.policy import Policy
    from pi0_jax.objective import SampleOptions, make_objective
    from pi0_jax.pi0 import init_params, loss, sample_actions
    from pi0_jax.sampler import integrate


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
