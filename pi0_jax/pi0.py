"""π0 on one page: where the network and the flow meet.

Everything left of this file knows nothing about training; everything right of it nothing about how velocities are made.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import FlowConfig, ModelConfig
from pi0_jax.flow.loss import flow_loss
from pi0_jax.flow.path import interpolate
from pi0_jax.flow.solvers import Solver, integrate
from pi0_jax.flow.time import sample_time
from pi0_jax.model.velocity import VelocityNetwork


def init_params(network: VelocityNetwork, key: PRNGKeyArray):
    """Random parameters as linen's boxed tree, which carries the logical axis names (`flax.linen.meta.unbox`)."""
    observation, x, time = example_inputs(network.config, batch_size=1)
    return network.init(key, observation, x, time)["params"]


def example_inputs(config: ModelConfig, batch_size: int) -> tuple[Observation, Array, Array]:
    """Zeros in the shapes that the network takes: observation, noisy chunk, time."""
    size = config.vision.image_size
    observation = Observation(
        images={name: jnp.zeros((batch_size, size, size, 3)) for name in config.cameras},
        image_masks={name: jnp.ones(batch_size, bool) for name in config.cameras},
        state=jnp.zeros((batch_size, config.action_dim)),
        prompt=jnp.zeros((batch_size, config.prompt_length), jnp.int32),
        prompt_mask=jnp.ones((batch_size, config.prompt_length), bool),
    )
    return observation, jnp.zeros((batch_size, config.action_horizon, config.action_dim)), jnp.zeros(batch_size)


def loss(
    network: VelocityNetwork, params, batch: Batch, key: PRNGKeyArray, flow: FlowConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Conditional flow-matching loss: how far the network's velocity is from noise - actions at random points.

    Args:
        network, params: the velocity network and its (unboxed) parameters.
        batch: normalised examples; images uint8 or in [-1, 1].
        key: for noise and times.
        flow: time distribution, draws an observation, what counts.

    Returns:
        The scalar loss, and metrics: `loss` again.
    """
    noise_key, time_key = jax.random.split(key)
    draws = flow.samples_per_observation
    b, horizon, dim = batch.actions.shape
    noise = jax.random.normal(noise_key, (b, draws, horizon, dim))
    time = sample_time(time_key, (b, draws), flow.time, flow.beta_alpha)
    if flow.mean_draw:
        noise, time = noise.at[:, 0].set(0.0), time.at[:, 0].set(1.0)
    x, velocity = interpolate(batch.actions[:, None], noise, time)
    predicted: Any = network.apply({"params": params}, scale_images(batch.observation), x, time)
    value = flow_loss(
        predicted,
        velocity,
        batch.step_mask[:, None] if flow.mask_padded_steps else None,
        batch.dim_mask[:, None] if flow.mask_padded_dims else None,
    )
    return value, {"loss": value}


def sample_actions(
    network: VelocityNetwork,
    params,
    observation: Observation,
    noise: Float[Array, "b ah ad"],
    *,
    num_steps: int = 10,
    solver: Solver = "euler",
    path: bool = False,
):
    """Turns noise into action chunks.

    Noise is an argument and not drawn here, because parity tests and servers both want to choose it.

    Args:
        network, params: the velocity network and its (unboxed) parameters.
        observation: images uint8 or in [-1, 1].
        noise: standard normal.
        num_steps, solver: how to integrate from t = 1 to t = 0.
        path: also return the points on the way, `[num_steps + 1, b, ah, ad]`.

    Returns:
        Normalised, padded actions `[b ah ad]`, float32 (and the path).
    """
    apply = functools.partial(network.apply, {"params": params})
    prefix = apply(scale_images(observation), method="prefill")

    def velocity(x, time) -> Any:
        return apply(prefix, x, jnp.broadcast_to(time, x.shape[:1]), method="velocity")

    return integrate(velocity, noise, num_steps, solver, path=path)


def scale_images(observation: Observation) -> Observation:
    """uint8 images to float32 in [-1, 1]; float images pass unchanged."""
    images = {
        name: image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if image.dtype == jnp.uint8 else image
        for name, image in observation.images.items()
    }
    return observation._replace(images=images)
