"""A tiny network, batches for it, and whole updates on any mesh; what is compiled is kept for the tests that follow."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax.linen import meta

from pi0_jax import pi0
from pi0_jax.batch import Batch, Observation
from pi0_jax.config import FlowConfig, MeshConfig, ModelConfig, OptimConfig
from pi0_jax.model.heads import make_network
from pi0_jax.training import optimizer, sharding, state, step

OPTIM = OptimConfig(peak_lr=1e-2, warmup_steps=2, decay_steps=50, ema_decay=0.9)


def random_batch(config: ModelConfig, size: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    pixels = config.vision.image_size
    observation = Observation(
        images={c: random.integers(0, 256, (size, pixels, pixels, 3), np.uint8) for c in config.cameras},
        image_masks={c: np.ones(size, bool) for c in config.cameras},
        state=random.standard_normal((size, config.action_dim), np.float32),
        prompt=random.integers(0, config.vocab_size, (size, config.prompt_length), np.int32),
        prompt_mask=np.ones((size, config.prompt_length), bool),
    )
    return Batch(
        observation,
        random.standard_normal((size, config.action_horizon, config.action_dim), np.float32),
        np.arange(config.action_horizon) < random.integers(1, config.action_horizon + 1, (size, 1)),
        np.ones((size, config.action_dim), bool),
    )


class Harness:
    """Compiled update of a tiny model, and its state."""

    def __init__(
        self, config: ModelConfig, mesh: MeshConfig, devices: int, optim: OptimConfig, flow: FlowConfig, parts: int
    ):
        network = make_network(config)
        self.mesh = sharding.make_mesh(mesh, jax.devices()[:devices])
        schedule = optimizer.make_schedule(optim, 50)
        boxed = jax.eval_shape(functools.partial(pi0.init_params, network), jax.random.key(0))
        transform = optimizer.make_optimizer(optim, schedule, boxed)
        create = functools.partial(state.create, optimizer=transform, ema=optim.ema_dtype if optim.ema_decay else None)
        self.shapes = meta.unbox(boxed)
        self.placement = sharding.shardings(self.mesh, jax.eval_shape(create, boxed))
        self.create = jax.jit(create, out_shardings=self.placement)
        self.update = jax.jit(
            step.make_update(
                functools.partial(pi0.draw, config, flow=flow),
                sharding.keep_batch_divided(self.mesh, lambda *args: pi0.error(network, *args, flow, parts=parts)),
                lambda key, batch: batch,
                transform,
                schedule,
                ema_decay=optim.ema_decay,
                seed=0,
                parts=parts,
            ),
            donate_argnums=0,
            out_shardings=(self.placement, None),
        )

    def start(self) -> state.TrainState:
        """A state of small random weights, the same on any mesh; `pi0.init_params` would take long to compile."""
        random = np.random.default_rng(0)
        return self.create(jax.tree.map(lambda x: 0.2 * random.standard_normal(x.shape, np.float32), self.shapes))

    def place(self, batch: Batch) -> Batch:
        return jax.device_put(batch, sharding.batch_sharding(self.mesh, len(batch.actions)))

    def run(self, current: state.TrainState, batches) -> tuple[state.TrainState, list[dict[str, float]]]:
        rows = []
        for batch in batches:
            current, metrics = self.update(current, self.place(batch))
            rows.append({name: float(value) for name, value in metrics.items()})
        return current, rows


@functools.cache
def harness(
    config: ModelConfig,
    *,
    mesh=MeshConfig(1, 1),  # noqa: B008  (frozen)
    devices=1,
    optim=OPTIM,
    flow=FlowConfig(),  # noqa: B008  (frozen)
    parts=1,
) -> Harness:
    return Harness(config, mesh, devices, optim, flow, parts)
