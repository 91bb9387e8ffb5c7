"""Rectified flow: a student learns straight lines from noise to the actions that a teacher's flow makes of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pi0_jax.batch import Batch
from pi0_jax.config import Gaussian, ModelConfig, Reflow
from pi0_jax.model.head import Network
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions, gaussian
from pi0_jax.sampler import Euler


def plain(config: Reflow) -> Gaussian:
    """The flow that student and teacher are, learned from demonstrations."""
    names = {field.name for field in dataclasses.fields(Gaussian)} & {
        field.name for field in dataclasses.fields(config)
    }
    return Gaussian(**{name: getattr(config, name) for name in names})


def network(config: Reflow, model: ModelConfig) -> Network:
    """The network of the model's head."""
    return gaussian.network(plain(config), model)


def make(config: Reflow, network: Network) -> Objective:
    """The objective's functions; `loss` also takes the teacher's parameters."""
    student = gaussian.make(plain(config), network)

    def draw(batch: Batch, key: Key[Array, ""], step: Int[Array, ""] | int) -> tuple[gaussian.Draws, Int[Array, ""]]:
        draws, count = student.draw(batch, key, step)
        # One noise per observation, at several times: its actions cost a whole sampling.
        return draws._replace(noise=jnp.broadcast_to(draws.noise[:, :1], draws.noise.shape)), count

    def loss(
        params: Params, draws: gaussian.Draws, count: Int[Array, ""], teacher: Params
    ) -> tuple[Float[Array, ""], Metrics]:
        options = SampleOptions(sampler=Euler(num_steps=config.teacher_steps))
        actions = student.sample(teacher, draws.batch.observation, draws.noise[:, 0], options)
        batch = draws.batch._replace(actions=jax.lax.stop_gradient(actions))
        return student.loss(params, draws._replace(batch=batch), count)

    return student._replace(draw=draw, loss=loss, teacher=config.teacher)
