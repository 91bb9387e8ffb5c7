"""Compiled programs that sample action chunks, by what they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from pi0_jax import checkpoint
from pi0_jax.batch import CodecTables, Observation
from pi0_jax.config import ModelConfig, PolicyConfig
from pi0_jax.errors import UserError
from pi0_jax.flow.realtime import Previous
from pi0_jax.model import target
from pi0_jax.model.fold import Read, fold, shapes_of
from pi0_jax.model.prefix import PrefixNetwork
from pi0_jax.model.quantize import Bits, quantize
from pi0_jax.model.writer import Block
from pi0_jax.objective import Objective, Params, SampleOptions, make_objective
from pi0_jax.objective.sampling import check_trained, solver_of
from pi0_jax.sampler import Sampler, trajectory

_READ_AT_ONCE_BELOW = 1 << 25
"""Bytes, in float32, of arrays that are read together; larger ones are read when they are asked for."""


class Inputs(NamedTuple):
    """What a program takes besides parameters; None for what it does without."""

    observation: Observation
    keys: Key[Array, "b"]
    """One per chunk, for noise."""
    noise: Float[np.ndarray, "b ah ad"] | None = None
    """Standard normal, in place of the keys' own."""
    guidance_scale: Float[np.ndarray, ""] | None = None
    previous: Previous | None = None
    text: Block | None = None
    """Text that was written after the prompts, such as subtasks."""
    codec: CodecTables | None = None
    """Of action tokens; `ChunkSampler` fills it in."""


class ProgramKey(NamedTuple):
    """What a program is compiled for."""

    sampler: Sampler
    path: bool
    """Whether it gives all points from noise to actions."""
    write: bool
    """Whether it writes text first."""
    inputs: Any
    """Shapes and dtypes of the inputs, and which of them there are."""


class ChunkSampler:
    """Samples chunks with folded parameters, by one compiled program per kind of call.

    Args:
        config: model, objective, and how to sample.
        model: the model with only the cameras that are there.
        read: where the parameters come from.
        folded: run folded parameters (`model.fold`), whose numbers are the same; else those of training.
        codec: of action tokens, where the objective writes some.

    Raises:
        UserError: settings that do not go together.
    """

    def __init__(
        self,
        config: PolicyConfig,
        model: ModelConfig,
        read: Read,
        *,
        folded: bool = True,
        codec: CodecTables | None = None,
    ):
        self.config, self.model, self.folded, self.codec = config, model, folded, codec
        self.objective = make_objective(config.objective, model)
        check_policy(config)
        network = self.objective.network
        self.params: Params = (fold if folded else _unfolded)(network, read)
        self.programs: dict[ProgramKey, jax.stages.Compiled] = {}

    def __call__(self, inputs: Inputs, sampler: Sampler, *, path: bool = False) -> Float[np.ndarray, "*n b ah ad"]:
        """Normalised, padded actions, in host memory; compiles at the first call of a kind.

        Args:
            inputs: observations, and what else there is.
            sampler: from noise to actions.
            path: give all points from noise to actions, along the first axis.
        """
        inputs = inputs._replace(codec=self.codec)
        program = self.compiled(inputs, sampler, path=path)
        with target.advice():
            return np.asarray(program(self.params, inputs))

    def write(self, inputs: Inputs, sampler: Sampler) -> tuple[Float[np.ndarray, "b ah ad"], Block]:
        """Actions as above, and the text that was written before them, in host memory."""
        inputs = inputs._replace(codec=self.codec)
        program = self.compiled(inputs, sampler, write=True)
        with target.advice():
            return jax.tree.map(np.asarray, program(self.params, inputs))

    def compiled(
        self, inputs: Inputs, sampler: Sampler, *, path: bool = False, write: bool = False
    ) -> jax.stages.Compiled:
        """The program of such a call, a function of parameters and inputs; compiled once."""
        return self.compiling(inputs, sampler, path=path, write=write)()

    def compiling(
        self, inputs: Inputs, sampler: Sampler, *, path: bool = False, write: bool = False
    ) -> Callable[[], jax.stages.Compiled]:
        """Traces the program of such a call, for a function that compiles it, which may run in another thread."""
        inputs = inputs._replace(codec=self.codec)
        avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        leaves, tree = jax.tree.flatten(avals)
        key = ProgramKey(sampler, path, write, (tuple(leaves), tree))
        if key in self.programs:
            return lambda: self.programs[key]
        with target.advice():
            lowered = jax.jit(self.function(sampler, path=path, write=write)).lower(self.params, inputs)

        def finish() -> jax.stages.Compiled:
            with target.advice():
                self.programs[key] = lowered.compile()
            return self.programs[key]

        return finish

    def function(self, sampler: Sampler, *, path: bool = False, write: bool = False) -> Callable[[Params, Inputs], Any]:
        """What is compiled: a function of parameters and inputs."""
        return sampling_function(self.objective, self.config, self.model, sampler, path=path, write=write)

    def quantize(self, bits: Bits) -> None:
        """Rounds the matrices of all layers to eight bits; programs are compiled again.

        Raises:
            UserError: the parameters are not folded.
        """
        if not self.folded:
            raise UserError("eight-bit weights need folded parameters: load the policy without folded=False.")
        self.params = quantize(self.params, bits)
        self.programs.clear()


def sampling_function(
    objective: Objective,
    config: PolicyConfig,
    model: ModelConfig,
    sampler: Sampler,
    *,
    path: bool = False,
    write: bool = False,
) -> Callable[[Params, Inputs], Any]:
    """A function of parameters and inputs, to normalised, padded actions; arguments of `ChunkSampler`. With `write`,
    also to the text that is written before them."""

    def sample(params: Params, inputs: Inputs):
        noise: Any = inputs.noise
        if noise is None:
            shape = (model.action_horizon, model.action_dim)
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(inputs.keys)
        trained = inputs.previous is not None and config.real_time.method == "trained"
        options = SampleOptions(
            sampler,
            None if inputs.guidance_scale is None else jnp.asarray(inputs.guidance_scale),
            config.guidance.without if config.guidance else "prompt",
            inputs.previous,
            config.real_time,
            inputs.keys,
            # Where each action has a time of its own, the sampler's are not all there are.
            None if objective.features is None or trained else objective.features(params, sampler),
            inputs.codec,
            inputs.text,
        )
        if write:
            assert objective.write is not None
            return objective.write(params, inputs.observation, noise, options)
        if not path:
            return objective.sample(params, inputs.observation, noise, options)
        if objective.flow is None:
            raise UserError("action tokens are decoded, so there is no way from noise to actions to look at.")
        flow, project = objective.flow(params, inputs.observation, options)
        how = {"features": options.features, "keys": options.keys, "project": project}
        return trajectory(flow, noise, solver_of(sampler), **how)

    return sample


def check_policy(config: PolicyConfig) -> None:
    """Raises UserError for settings of a policy that do not go together."""
    config.check()
    if config.real_time.method == "trained":
        check_trained(getattr(config.objective, "max_delay", 0))


def from_checkpoint(path: str | Path, config: PolicyConfig) -> Read:
    """Reads from a checkpoint of ours: small arrays at once, large ones when they are asked for.

    What is stored in fewer bits than asked for stays so, which takes half of the memory and of the time.

    Raises:
        CheckpointError: the weights are not those of such a model.
    """
    shapes = shapes_of(make_objective(config.objective, config.model).network)
    stored = checkpoint.stored_params(path, unflatten_dict(shapes, sep="/"))

    def restored(wanted: dict[str, Any]) -> dict[str, Any]:
        wanted = {path: min(x, stored[path], key=lambda y: y.dtype.itemsize) for path, x in wanted.items()}
        params = checkpoint.restore_params(path, unflatten_dict(wanted, sep="/"), partial=True)
        return flatten_dict(params, sep="/")

    small = restored({path: x for path, x in shapes.items() if 4 * x.size < _READ_AT_ONCE_BELOW})

    def read(wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        large = {path: x for path, x in wanted.items() if path not in small}
        known = {path: small[path].astype(x.dtype) for path, x in wanted.items() if path in small}
        return known | (restored(large) if large else {})

    return read


def _unfolded(network: PrefixNetwork, read: Read) -> Params:
    """The parameters of training, in its float32."""
    shapes = shapes_of(network)
    return unflatten_dict({path: x.astype(shapes[path].dtype) for path, x in read(shapes).items()}, sep="/")


def with_steps(sampler: Sampler, num_steps: int | None) -> Sampler:
    """The sampler with another number of steps; None: its own.

    Raises:
        UserError: it decodes tokens, and has no steps.
    """
    if num_steps is None:
        return sampler
    if not hasattr(sampler, "num_steps"):
        raise UserError("action tokens are decoded one after another: there is no number of steps to choose.")
    return dataclasses.replace(sampler, num_steps=num_steps)
