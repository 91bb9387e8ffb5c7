"""A small run for the tests of checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.checkpoint import Assets
from pi0_jax.config import ModelConfig, PolicyConfig, TrainConfig

STATS = {"norm_stats": {"state": {"mean": [0.1, 1 / 3], "std": [1.0, 2.0], "q01": None, "q99": None}}}
TRAIN = TrainConfig(
    policy=PolicyConfig(robot="tabletop", model=ModelConfig(cameras=("a", "b"), variant="pi05")), num_steps=7
)
ASSETS = Assets(TRAIN.policy, STATS, b"\x00tokenizer\xff", TRAIN)


class Moments(NamedTuple):
    count: jax.Array
    mu: dict
    nothing: None = None


def weights(seed=0, shape=(30, 40)):
    return {"layer": {"w": jax.random.normal(jax.random.key(seed), shape)}, "b": jnp.full(5, seed, jnp.float32)}


def train_state(seed=0):
    return {"step": jnp.int32(seed), "opt_state": (Moments(jnp.int32(3), weights(seed + 100)), ())}


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
