"""Flows whose answer is known, and a small network that learns one in a second."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pi0_jax.flow.path import Estimate, Path, Predicts, along


def gaussian_velocity(mean, deviation):
    """The marginal velocity of data N(mean, deviation²) on the straight path: E[noise − data | x_t = x]."""

    def velocity(x, time):
        t = jnp.asarray(time)
        t = t[..., None, None] if t.ndim else t
        variance = t**2 + (1 - t) ** 2 * deviation**2
        return -mean + (t - (1 - t) * deviation**2) / variance * (x - (1 - t) * mean)

    return velocity


def posterior(path: Path, mean, deviation):
    """Posterior means of data N(mean, deviation²) and of the noise, given the point x at a time."""

    def estimate(x, time):
        c = path.at(along(jnp.asarray(time), x))
        centred = (x - c.alpha * mean) / (c.alpha**2 * deviation**2 + c.sigma**2)
        return Estimate(mean + c.alpha * deviation**2 * centred, c.sigma * centred)

    return estimate


def exact_prediction(path: Path, predicts: Predicts, mean, deviation):
    """What the best network says on this path: the posterior mean of its target."""

    def predict(x, time, *_):
        c = path.at(along(jnp.asarray(time), x))
        data, noise = posterior(path, mean, deviation)(x, time)
        return {
            "velocity": c.d_alpha * data + c.d_sigma * noise,
            "noise": noise,
            "data": data,
            "v": c.alpha * noise - c.sigma * data,
        }[predicts]

    return predict


def exact_end(path: Path, mean, deviation, noise):
    """Where the flow carries `noise` from t = 1 to: an affine map, which keeps order."""
    c = path.at(1.0)
    return mean + deviation * (noise - c.alpha * mean) / jnp.sqrt(c.alpha**2 * deviation**2 + c.sigma**2)


class Field(nn.Module):
    """An MLP v(x, t, more), x being a chunk."""

    width: int = 64

    @nn.compact
    def __call__(self, x, time, *more):
        time = jnp.broadcast_to(time, x.shape[:-2])[..., None]
        angles = jnp.pi * time * jnp.array([[0.5, 1.0, 2.0]])
        h = jnp.concatenate([x.reshape(*x.shape[:-2], -1), time, jnp.sin(angles), jnp.cos(angles), *more], axis=-1)
        for _ in range(2):
            h = nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(x.shape[-2] * x.shape[-1])(h).reshape(x.shape)


def fit(loss, params, key, num_steps: int = 1000, peak_lr: float = 5e-3):
    """Parameters after `num_steps` of Adam on `loss(params, key)`, in one compiled program."""
    optimizer = optax.adam(optax.cosine_decay_schedule(peak_lr, num_steps))

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(loss)(params, key)
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, change), state), None

    @jax.jit
    def run(params, key):
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, num_steps))[0][0]

    return run(params, key)
