"""The nearest settings that fit where a run does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from pi0_jax.config import MeshConfig, OptimConfig, TrainConfig
from pi0_jax.config.replace import replace
from pi0_jax.plan.compile import build_program, resident_bytes
from pi0_jax.plan.cost import Plan, estimate_temporaries, make_plan
from pi0_jax.plan.devices import find_devices, usable_memory
from pi0_jax.training import sharding

REMATS = ("none", "matmuls", "gate_up", "full")
"""From the one that keeps most."""


def alternatives(
    config: TrainConfig, mesh: Mesh, needs: Callable[[TrainConfig], float]
) -> Iterator[tuple[str, TrainConfig]]:
    """Ways to need less memory, each on top of those before it, with the flags that ask for them.

    First what changes no number: dividing the state, computing activations again, or microbatches. Then what is held
    per parameter: an average in bfloat16, 8-bit moments, no average. At last, in place of those, adapters alone.
    Microbatches are given up again where the sum of their gradients takes more than they save.

    Args:
        config: of the run.
        mesh: of the run.
        needs: bytes on each device under a configuration.
    """
    flags: dict[str, str] = {}

    def with_flags(values: dict[str, str], config: TrainConfig) -> tuple[str, TrainConfig]:
        flags.update(values)
        return " ".join(f"{flag} {value}" for flag, value in flags.items()), config

    tensor, ways = mesh.shape["tensor"], sharding.batch_ways(mesh)
    if mesh.shape["data"] > 1 and config.mesh.slices == 1:
        config = dataclasses.replace(config, mesh=MeshConfig(1, -1, tensor))
        values = {"--mesh.data": "1", "--mesh.fsdp": "-1"} | ({"--mesh.tensor": str(tensor)} if tensor > 1 else {})
        yield with_flags(values, config)
    for policy in REMATS[REMATS.index(config.policy.model.remat) + 1 :]:
        config = replace(config, {"policy.model.remat": policy})
        yield with_flags({"--policy.model.remat": policy}, config)
    undivided = config
    while config.batch_size % (2 * ways * config.grad_accum_steps) == 0:
        config = dataclasses.replace(config, grad_accum_steps=2 * config.grad_accum_steps)
        yield with_flags({"--grad-accum-steps": str(config.grad_accum_steps)}, config)
    if config.grad_accum_steps > undivided.grad_accum_steps and needs(config) > needs(undivided):
        config = undivided
        del flags["--grad-accum-steps"]
    same_numbers = dict(flags), config
    for changes in _smaller_optimizers(config.optim):
        config = replace(config, {f"optim.{name}": value for name, value in changes.items()})
        yield with_flags({f"--optim.{name.replace('_', '-')}": str(value) for name, value in changes.items()}, config)
    if config.tune.recipe != "lora":
        flags, config = same_numbers
        config = replace(config, {"tune.recipe": "lora"})
        yield with_flags({"--tune.recipe": "lora"}, config)


def _smaller_optimizers(optim: OptimConfig) -> Iterator[dict[str, Any]]:
    """Changes of the optimizer's settings, each of which needs less than those before it."""
    if optim.ema_decay is not None and optim.ema_dtype != "bfloat16":
        yield {"ema_dtype": "bfloat16"}
    if optim.name == "adamw":
        yield {"name": "adamw_8bit"}
    if optim.ema_decay is not None:
        yield {"ema_decay": None}


def find_fitting(config: TrainConfig, plan: Plan) -> tuple[str, Plan] | None:
    """Flags and plan of the first of `alternatives` that fits: chosen by the estimate, scaled to the figure of the
    compiler in the `plan` of what does not fit, and compiled. None where none of them fits."""
    assert plan.device is not None
    devices, memory = find_devices(plan.topology)[1], usable_memory(plan.device)
    run, program, _ = build_program(config, devices)
    scale = plan.temporaries / estimate_temporaries(run, program)

    def guess(other: TrainConfig, limit: float = math.inf) -> float:
        """Bytes per device; of what is resident alone where that is more than the limit, since the rest takes time."""
        run, program, batch = build_program(other, devices)
        held = sum(resident_bytes(program, batch).values())
        return held + (scale * estimate_temporaries(run, program) if held <= limit else 0.0)

    for flags, other in alternatives(config, run.mesh, guess):
        if guess(other, memory) <= memory and (checked := make_plan(other, plan.topology)).fits:
            return flags, checked
    return None
