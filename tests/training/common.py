"""Whole updates of a tiny network on any mesh, as a run makes them; compiled programs are kept for later tests."""

from __future__ import annotations

import functools

import jax
import numpy as np

from pi0_jax.batch import Batch
from pi0_jax.config import Gaussian, MeshConfig, ModelConfig, ObjectiveConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.training.program import build
from pi0_jax.training.resolve import resolve
from pi0_jax.training.state import TrainState

OPTIM = OptimConfig(peak_lr=1e-2, warmup_steps=2, decay_steps=50, ema_decay=0.9)


class Harness:
    """Compiled functions of a run of a tiny model, and states of it."""

    def __init__(self, config: TrainConfig, devices: int):
        self.run_of = resolve(config, jax.devices()[:devices])
        self.mesh, self.objective = self.run_of.mesh, self.run_of.objective
        self.program = build(self.run_of, lambda key, batch: batch)
        self.update = self.program.update
        self.placement = jax.tree.map(lambda x: x.sharding, self.program.shapes)

    def start(self) -> TrainState:
        """A state of small random weights, the same on any mesh; the network's own would take long to compile."""
        random = np.random.default_rng(0)

        def values(x):
            return jax.device_put(0.2 * random.standard_normal(x.shape, np.float32), x.sharding)

        return self.program.start(jax.tree.map(values, self.program.shapes.weights))

    def place(self, batch: Batch) -> Batch:
        return jax.device_put(batch, self.run_of.batch_placement)

    def run(self, current: TrainState, batches) -> tuple[TrainState, list[dict[str, float]]]:
        rows = []
        for batch in batches:
            current, metrics = self.update(np.uint32(0), current, self.place(batch))
            rows.append({name: float(value) for name, value in metrics.items()})
        return current, rows


@functools.cache
def harness(
    model: ModelConfig,
    *,
    mesh=MeshConfig(1, 1),
    devices: int = 1,
    optim: OptimConfig = OPTIM,
    objective: ObjectiveConfig = Gaussian(),
    grad_accum_steps: int = 1,
) -> Harness:
    policy = PolicyConfig(robot="tabletop", model=model, objective=objective)
    config = TrainConfig(
        policy=policy, mesh=mesh, optim=optim, grad_accum_steps=grad_accum_steps, batch_size=32 * grad_accum_steps
    )
    return Harness(config, devices)
