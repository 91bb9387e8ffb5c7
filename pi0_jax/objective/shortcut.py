"""Shortcut models: average velocities, partly learned from data and partly bootstrapped (`flow.shortcut`)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pi0_jax.batch import Batch, Observation, scale_images
from pi0_jax.config import ModelConfig, Shortcut, Straight
from pi0_jax.errors import UserError
from pi0_jax.flow.loss import flow_loss
from pi0_jax.flow.path import interpolate
from pi0_jax.flow.shortcut import bootstrap_target, sample_spans, sampling_span
from pi0_jax.model.head import Network, make_head
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions, gaussian
from pi0_jax.objective.conditioning import check_dropout, drop
from pi0_jax.objective.sampling import make_flow, sample_flow, time_features
from pi0_jax.sampler import Sampler
from pi0_jax.sampler.runge_kutta import Euler

PATH = Straight()


class Examples(NamedTuple):
    """Points and spans of some examples."""

    points: gaussian.Draws
    span: Float[Array, "b s"]
    """Span of the average velocity; 0 where the velocity itself is learned."""


class Draws(NamedTuple):
    """All examples, and those among them, the first ones, that learn from the bootstrap target."""

    all: Examples
    bootstrap: Examples


def network(config: Shortcut, model: ModelConfig) -> Network:
    """The network of the model's head, which also reads a span.

    Raises:
        UserError: settings that do not go together.
    """
    check_dropout(config.dropout)
    if not 0 < config.bootstrap_fraction < 1:
        raise UserError(
            f"objective.bootstrap_fraction is {config.bootstrap_fraction}; it is a fraction of the examples, between 0 "
            "and 1: without any no span is learned, without others no velocity."
        )
    return make_head(model, span=True)


def make(config: Shortcut, network: Network) -> Objective:
    """The objective's functions."""

    def draw(batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | int) -> tuple[Draws, Int[Array, ""]]:
        points = gaussian.draw_points(config, batch, key)
        b, draws = points.time.shape
        count = max(1, round(config.bootstrap_fraction * b))
        times, spans = sample_spans(jax.random.fold_in(key, 4), (count, draws))
        points = points._replace(time=points.time.at[:count].set(times))
        examples = Examples(points, jnp.zeros((b, draws)).at[:count].set(spans))
        bootstrap = jax.tree.map(lambda leaf: leaf[:count], examples)
        return Draws(examples, bootstrap), jnp.sum(gaussian.chunk_mask(config, batch, points.noise.shape))

    def inputs(examples: Examples) -> tuple[Observation, Array, Array]:
        """Observation, point and target of the velocity."""
        p = examples.points
        observation = drop(scale_images(p.batch.observation), p.dropout, config.dropout)
        actions = jnp.broadcast_to(p.batch.actions[:, None], p.noise.shape)
        return observation, *interpolate(PATH, actions, p.noise, p.time)

    def loss(params: Params, draws: Draws, count: Int[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        some = draws.bootstrap
        observation, x, _ = inputs(some)

        def average(x, time, span):
            return network.joint(params, observation, x, time, span)

        bootstrapped = bootstrap_target(average, x, some.points.time, some.span)
        observation, x, target = inputs(draws.all)
        target = target.at[: len(bootstrapped)].set(bootstrapped)
        points = draws.all.points
        predicted = network.joint(params, observation, x, points.time, draws.all.span)
        mask = gaussian.chunk_mask(config, points.batch, points.noise.shape)
        return flow_loss(predicted, target, mask, count), {}

    def flow(params: Params, observation: Observation, options: SampleOptions):
        span = sampling_span(euler(options.sampler).num_steps)
        return make_flow(network, PATH, "velocity", params, observation, options, span=span)

    return Objective(
        network=network,
        draw=draw,
        loss=loss,
        sample=lambda params, observation, noise, options: sample_flow(
            *flow(params, observation, options), noise, options
        ),
        flow=flow,
        features=lambda params, sampler: time_features(
            network, params, sampler, sampling_span(euler(sampler).num_steps)
        ),
    )


def euler(sampler: Sampler) -> Euler:
    """The sampler, if it makes equal steps along average velocities.

    Raises:
        UserError: another one.
    """
    if not isinstance(sampler, Euler) or sampler.grid_power != 1:
        raise UserError(f"a shortcut model is sampled in equal steps of Euler's; policy.sampler is {sampler}.")
    return sampler
