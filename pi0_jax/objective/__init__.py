"""What a policy learns and how it acts, as plain functions.

The class of a configuration names its file: `Gaussian` is made by `objective/gaussian.py`, which has

    network(config, model)      the network that the objective trains
    make(config, network)       the objective itself

so a new objective is a class in `config/objective.py` and a file here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key

from pi0_jax.batch import Batch, CodecTables, Observation
from pi0_jax.config import ConditionDropout, Independent, ModelConfig, ObjectiveConfig, RealTimeConfig
from pi0_jax.config.objective import Condition
from pi0_jax.flow.path import Chunk
from pi0_jax.flow.realtime import Previous
from pi0_jax.model.writer import Block
from pi0_jax.sampler import Euler, Flow, Sampler

Params = Any
"""Nested dicts of arrays: a network's parameters."""
Draws = Any
"""Tree of arrays. The first axis of each is over examples, and is the one that microbatches divide."""
Metrics = dict[str, Array]


class SampleOptions(NamedTuple):
    """How chunks are sampled, besides the noise."""

    sampler: Sampler = Euler()
    guidance_scale: float | Float[Array, ""] | None = None
    """Of classifier-free guidance; may be traced. None: no guidance."""
    guidance_without: Condition = "prompt"
    previous: Previous | None = None
    """What is left of the chunks that are being executed, for the new ones to go on from."""
    real_time: RealTimeConfig = RealTimeConfig()
    """How they go on; its `max_guidance` may be traced."""
    keys: Key[Array, "b"] | None = None
    """Random keys, one per chunk, for samplers that draw noise on the way."""
    features: Any = None
    """`Objective.features` of the sampler, computed beforehand; None: each step computes its own."""
    codec: CodecTables | None = None
    """Of the FAST tokens that are decoded."""
    text: Block | None = None
    """Text that was written after the prompt, such as the subtask; None: none was."""


class Objective(NamedTuple):
    """What can be learned, and how it acts: functions, as optax pairs `init` and `update`."""

    network: Any
    """With `init(key)`, the parameters in boxes that carry logical axis names."""
    draw: Callable[[Batch, Key[Array, ""], Array | int], tuple[Draws, Int[Array, ""]]]
    """All randomness of a batch at a step of training. Returns the draws, and the count: the number of entries that
    are in the loss, which is divided by it."""
    loss: Callable[..., tuple[Float[Array, ""], Metrics]]
    """Of parameters, the draws of any microbatch, the count of the whole batch, and the teacher's parameters if there
    is one. Losses of microbatches add up to that of the batch."""
    sample: Callable[[Params, Observation, Float[Array, "b ah ad"], SampleOptions], Float[Array, "b ah ad"]]
    """Normalised, padded actions, float32, from observations and standard normal noise."""
    flow: Callable[[Params, Observation, SampleOptions], tuple[Flow, Callable[[Chunk], Chunk]]] | None = None
    """Runs `network.prefill`, and returns what a solver integrates against it, guidance included, and `project`, which
    sets the certain actions in each point (real-time chunking). None: there is nothing to integrate."""
    features: Callable[[Params, Sampler], Any] | None = None
    """What the network computes from the flow time alone (time embedding, modulations of norms), one row per step of
    the sampler: it is the same for every observation."""
    write: Callable[..., tuple[Float[Array, "b ah ad"], Block]] | None = None
    """As `sample`, but text is written first, in the same program: actions, and the text. None: it writes none."""
    teacher: str | None = None
    """Checkpoint whose parameters `loss` reads besides."""


def make_objective(config: ObjectiveConfig, model: ModelConfig) -> Objective:
    """The objective of a configuration, on its network.

    Raises:
        UserError: the model has no such head, or settings that do not go together.
    """
    module = _module(config)
    return module.make(config, module.network(config, model))


def for_validation(config: ObjectiveConfig) -> ObjectiveConfig:
    """The objective whose loss is measured on held-out data, whatever training does: only steps inside episodes count
    (which drops the last batch's filling), nothing is dropped, noise is paired at random, and no warm-up goes on."""
    plain = getattr(_module(config), "plain", lambda c: c)(config)
    fixed = {"mask_padded_steps": True, "dropout": ConditionDropout(), "coupling": Independent()}
    fixed |= {"regression_warmup_steps": 0}
    names = {field.name for field in dataclasses.fields(plain)}
    return dataclasses.replace(plain, **{name: value for name, value in fixed.items() if name in names})


def _module(config: ObjectiveConfig) -> ModuleType:
    return importlib.import_module(f"{__name__}.{type(config).__name__.lower()}")
