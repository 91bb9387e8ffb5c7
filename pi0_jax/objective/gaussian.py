"""Flow matching and diffusion: the network predicts the velocity, noise or data at a random point of a path.

    x_t = alpha(t) · actions + sigma(t) · noise          t drawn at random (`flow/time.py`), noise standard normal
    loss = | network(observation, x_t, t) - target |²    mean over the entries in the loss mask, of the whole batch

On π0's straight path alpha = 1 - t and sigma = t, and its target is the velocity dx/dt = noise - actions. So t = 1 is
noise, and the paper's τ is 1 - t. By default the loss leaves out steps after an episode's end, not padded dimensions.

An observation may have several draws of (noise, t). Its tokens, most of the work, are then computed once, and the
action tokens of a draw attend to them and to those of the same draw.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pi0_jax.batch import Batch, Observation, scale_images
from pi0_jax.config import Gaussian, Independent, ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.flow.loss import flow_loss, loss_mask
from pi0_jax.flow.path import interpolate
from pi0_jax.flow.realtime import is_clean
from pi0_jax.model.head import Network, make_head
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions
from pi0_jax.objective.conditioning import check_dropout, coupled_noise, drop
from pi0_jax.objective.sampling import make_flow, sample_flow, time_features


class Draws(NamedTuple):
    """Examples, and what was drawn at random for them. The first axis of every array is over examples."""

    batch: Batch
    dropout: Float[Array, "b"]
    """Uniform in [0, 1): decides whether the prompt, the images or both are masked (classifier-free guidance)."""
    noise: Float[Array, "b s ah ad"]
    """Of s draws per example, for ah actions of ad dimensions (padded)."""
    time: Float[Array, "b s"]
    delay: Int[Array, "b s"]
    """Number of clean actions: the first of a chunk, given without noise (t = 0) and not in the loss. So the network
    learns to continue a chunk that is being executed (training-time real-time chunking, `Gaussian.max_delay`)."""


def network(config: Gaussian, model: ModelConfig) -> Network:
    """Checks the settings, and makes the network with the model's head.

    Raises:
        UserError: settings that do not go together.
    """
    check_dropout(config.dropout)
    if (config.regression_draw or config.regression_warmup_steps) and config.predicts == "noise":
        raise UserError(
            "objective.regression_draw and regression_warmup_steps: a network that predicts noise has nothing to "
            "regress on."
        )
    if not 0 <= config.max_delay < model.action_horizon:
        raise UserError(
            f"objective.max_delay is {config.max_delay}; of a chunk of {model.action_horizon} actions at most "
            f"{model.action_horizon - 1} can stay clean, and 0 means none."
        )
    if config.max_delay and not model.head.time_per_action:
        raise UserError(
            f"objective.max_delay is {config.max_delay}, which takes a head with a time per action; "
            f"{type(model.head).__name__} has one time per chunk."
        )
    return make_head(model)


def make(config: Gaussian, network: Network) -> Objective:
    """The objective: how to draw, the loss, and how to sample."""

    def draw(batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | int) -> tuple[Draws, Int[Array, ""]]:
        draws = draw_all(config, batch, key, step)
        return draws, jnp.sum(_mask(config, draws))

    def loss(params: Params, draws: Draws, count: Int[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        it = noisy(config, draws)
        predicted = network.joint(params, it.observation, it.x, it.time)  # one pass over the observation and all draws
        return flow_loss(predicted, it.target, it.mask, count), {}

    def flow(params: Params, observation, options: SampleOptions):
        return make_flow(
            network, config.path, config.predicts, params, observation, options, max_delay=config.max_delay
        )

    return Objective(
        network=network,
        draw=draw,
        loss=loss,
        sample=lambda params, observation, noise, options: sample_flow(
            *flow(params, observation, options), noise, options
        ),
        flow=flow,
        features=lambda params, sampler: time_features(network, params, sampler),
    )


def draw_all(config: Gaussian, batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | int) -> Draws:
    """Everything that is drawn at random for a batch at a step of training."""
    draws = draw_points(config, batch, key)
    delay = jax.random.randint(jax.random.fold_in(key, 5), draws.time.shape, 0, config.max_delay + 1)
    noise, time = draws.noise, draws.time
    if config.coupling != Independent():
        observation = drop(scale_images(batch.observation), draws.dropout, config.dropout)  # as in the loss
        noise = coupled_noise(config.coupling, noise, batch.actions, observation, jax.random.fold_in(key, 3))
    if config.regression_draw or config.regression_warmup_steps:
        # At t = 1 without noise x_t is 0 and tells nothing of the actions: what is learned is their mean given the
        # observation (for a velocity, minus it), which is plain regression.
        first = (jnp.arange(noise.shape[1]) == 0) & config.regression_draw
        regress = first | (jnp.asarray(step) < config.regression_warmup_steps)
        noise = jnp.where(regress[None, :, None, None], 0.0, noise)
        time = jnp.where(regress[None], 1.0, time)
    return draws._replace(noise=noise, time=time, delay=delay)


class Noisy(NamedTuple):
    """What the network is given, and what it shall predict of it."""

    observation: Observation
    """Images in [-1, 1]."""
    x: Float[Array, "b s ah ad"]
    time: Float[Array, "b s ..."]
    """One per draw, or per action."""
    target: Float[Array, "b s ah ad"]
    mask: Bool[Array, "b s ah ad"]
    """True where the loss counts."""


def noisy(config: Gaussian, draws: Draws) -> Noisy:
    """The points that were drawn, on the path between actions and noise."""
    observation = drop(scale_images(draws.batch.observation), draws.dropout, config.dropout)
    noise, time = draws.noise, draws.time
    actions = jnp.broadcast_to(draws.batch.actions[:, None], noise.shape)
    if config.max_delay:  # a time per action, [b s ah]: clean ones are at t = 0
        time = jnp.where(is_clean(draws.delay, noise.shape[2]), 0.0, time[..., None])
    x, target = interpolate(config.path, actions, noise, time, config.predicts)
    return Noisy(observation, x, time, target, _mask(config, draws))


def _mask(config: Gaussian, draws: Draws) -> Bool[Array, "b s ah ad"]:
    """The loss mask: that of padding, without clean actions."""
    clean = is_clean(draws.delay, draws.noise.shape[2])
    return chunk_mask(config, draws.batch, draws.noise.shape) & ~clean[..., None]


def draw_points(config, batch: Batch, key: Key[Array, ""]) -> Draws:
    """Noise, times and dropout of a batch, for every objective that learns on a path; with no clean actions.

    Args:
        config: with `draws` and `time`.
        batch: normalised examples.
        key: of this step. Numbers folded into it, here and elsewhere, have to differ: 2 dropout, 3 coupling, 4 spans
            of shortcut models, 5 delay, 6 rounding of the moving average.
    """
    noise_key, time_key = jax.random.split(key)
    b, horizon, dim = batch.actions.shape
    noise = jax.random.normal(noise_key, (b, config.draws, horizon, dim))
    time = config.time.sample(time_key, (b, config.draws))
    dropout = jax.random.uniform(jax.random.fold_in(key, 2), (b,))
    return Draws(batch, dropout, noise, time, jnp.zeros(time.shape, jnp.int32))


def chunk_mask(config, batch: Batch, shape: tuple[int, ...]):
    """The loss mask as far as padding decides it: True for entries that are in the loss.

    Args:
        config: with `mask_padded_steps` and `mask_padded_dims`.
        batch: whose masks say what is padding.
        shape: of the noise, `[b, s, ah, ad]`.
    """
    return loss_mask(
        shape,
        batch.step_mask[:, None] if config.mask_padded_steps else None,  # [b 1 ah]
        batch.dim_mask[:, None] if config.mask_padded_dims else None,  # [b 1 ad]
    )
