"""Sampling of networks that predict chunks on a Gaussian path: from parameters and observations to a flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0_jax.batch import Observation, scale_images
from pi0_jax.config.objective import Predicts
from pi0_jax.errors import UserError
from pi0_jax.flow.guidance import classifier_free
from pi0_jax.flow.path import Chunk, Path, to_velocity
from pi0_jax.flow.realtime import continue_prefix, real_time_chunking
from pi0_jax.model import target
from pi0_jax.model.head import Network
from pi0_jax.objective import Params, SampleOptions
from pi0_jax.objective.conditioning import without
from pi0_jax.sampler import Flow, Sampler, Solver, integrate


def make_flow(
    network: Network,
    path: Path,
    predicts: Predicts,
    params: Params,
    observation: Observation,
    options: SampleOptions,
    *,
    span: float | None = None,
    max_delay: int = 0,
    prefill: Callable[[Params, Observation], Any] | None = None,
) -> tuple[Flow, Callable[[Chunk], Chunk]]:
    """The observation's tokens computed once, and a prediction against them with all guidance around it.

    Args:
        network, path, predicts: what was trained.
        params: the network's.
        observation: images uint8 or in [-1, 1].
        options: guidance and what is left of the chunks in execution.
        span: of average velocities; None for networks without it.
        max_delay: clean actions that the network learned to go on from.
        prefill: the observation's tokens; None: the network's own. With guidance its rows are those of the observation,
            and again those of what is left without the condition.

    Raises:
        UserError: real-time chunking that the network was not trained for.
    """
    observation = scale_images(observation)
    guided = options.guidance_scale is not None
    if guided:
        both = observation, without(observation, options.guidance_without)
        observation = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *both)
    prefix = (prefill or network.prefill)(params, observation)

    def predict(x, time, features=None):
        time = jnp.broadcast_to(jnp.float32(time), x.shape[: jnp.ndim(time) or 1])
        return network.velocity(
            params, prefix, x, time, None if span is None else jnp.full(time.shape, span, jnp.float32), features
        )

    if guided:
        assert options.guidance_scale is not None
        predict = classifier_free(predict, options.guidance_scale)
    if options.previous is None:
        return Flow(predict, path, predicts), lambda x: x

    def velocity(x, time, *features):
        return to_velocity(path, predict(x, time, *features), x, time, predicts)

    def differentiable(x, time, *features):
        with target.without_kernels():
            return velocity(x, time, *features)

    real_time = options.real_time
    if real_time.method == "trained":
        check_trained(max_delay)
        continued, project = continue_prefix(velocity, options.previous)
        return Flow(continued, path), project
    through_network = real_time.method == "guidance"
    steered = real_time_chunking(
        differentiable if through_network else velocity,
        options.previous,
        real_time.schedule,
        real_time.max_guidance,
        path=path,
        through_network=through_network,
    )
    return Flow(steered, path), lambda x: x


def sample_flow(
    flow: Flow, project: Callable[[Chunk], Chunk], noise: Float[Array, "b ah ad"], options: SampleOptions
) -> Float[Array, "b ah ad"]:
    """Actions from noise."""
    return integrate(
        flow, noise, solver_of(options.sampler), features=options.features, keys=options.keys, project=project
    )


def time_features(network: Network, params: Params, sampler: Sampler, span: float | None = None) -> Any:
    """What the network computes of a sampler's times alone, one row per step."""
    times = jnp.asarray(solver_of(sampler).grid.times[:-1])
    spans = None if span is None else jnp.full(times.shape, span, jnp.float32)
    return network.time_features(params, times, spans)


def solver_of(sampler: Sampler) -> Solver:
    """The sampler as a solver.

    Raises:
        UserError: it decodes tokens.
    """
    if not isinstance(sampler, Solver):
        raise UserError(
            f"policy.sampler is {type(sampler).__name__}, which decodes tokens; this network predicts chunks."
        )
    return sampler


def check_trained(max_delay: int) -> None:
    """Raises UserError for networks that did not learn to go on from clean actions."""
    if not max_delay:
        raise UserError(
            "real_time.method is 'trained', but this network was not trained to go on from clean actions. Train or "
            "fine-tune it with --policy.objective.max-delay, or choose guidance."
        )
