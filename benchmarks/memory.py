"""Bytes that training holds from step to step at full size, by what trains and by optimizer, for docs/scaling.md:

    python benchmarks/memory.py

Exact: from the shapes of the state (`jax.eval_shape`), on one device. Activations are not in it; `pi0 plan` has them.
"""

from __future__ import annotations

import functools

import jax
import optax
from flax.linen import meta

from pi0_jax import pi0
from pi0_jax.checkpoint import tree_bytes
from pi0_jax.config import PI0, PI05, OptimConfig, PolicyConfig, TrainConfig, TuneConfig
from pi0_jax.model.heads import make_network
from pi0_jax.training.optimizer import make_optimizer
from pi0_jax.training.partition import flat, frozen_names, partition, with_adapters
from pi0_jax.training.state import TrainState, create

TUNES = {
    "full": TuneConfig(),
    "vision_frozen": TuneConfig("vision_frozen"),
    "expert": TuneConfig("expert"),
    "lora": TuneConfig("lora"),
    "lora, image encoder frozen": TuneConfig("lora", frozen=("image_encoder/*",)),
}
OPTIMIZERS = {
    "adamw": OptimConfig(),
    "adamw, bfloat16 moment and average": OptimConfig(moment_dtype="bfloat16", ema_dtype="bfloat16"),
    "adamw_8bit, bfloat16 average": OptimConfig(name="adamw_8bit", ema_dtype="bfloat16"),
    "adamw_8bit, no average": OptimConfig(name="adamw_8bit", ema_decay=None),
    "muon": OptimConfig(name="muon"),
    "muon, bfloat16 momentum and average": OptimConfig(name="muon", moment_dtype="bfloat16", ema_dtype="bfloat16"),
    "adafactor, no moment, bfloat16 average": OptimConfig(name="adafactor", b1=0.0, ema_dtype="bfloat16"),
    "adafactor, no moment, no average": OptimConfig(name="adafactor", b1=0.0, ema_decay=None),
}


def state_of(config: TrainConfig) -> TrainState:
    """Shapes of a run's state."""
    config = with_adapters(config)
    model, optim = config.policy.model, config.optim
    weights = jax.eval_shape(functools.partial(pi0.init_params, make_network(model)), jax.random.key(0))
    frozen = frozen_names(config.tune, model, flat(weights))
    transform = make_optimizer(optim, optax.constant_schedule(1e-4), partition(weights, frozen)[0])
    ema = None if optim.ema_decay is None else optim.ema_dtype
    return meta.unbox(jax.eval_shape(functools.partial(create, optimizer=transform, ema=ema, frozen=frozen), weights))


def measure(config: TrainConfig) -> dict[str, int]:
    """Bytes of the parts of a run's state, and of the gradient, which an update makes besides."""
    state = state_of(config)
    parts = {"trained": state.params, "frozen": state.frozen, "optimizer": state.opt_state, "average": state.ema}
    return {name: tree_bytes(part) for name, part in (parts | {"gradient": state.params}).items()}


def main() -> None:
    for name, model in (("π0", PI0), ("π0.5", PI05)):
        print(f"\n| {name} | trained | optimizer | average | frozen | state | and gradient |\n|" + "---|" * 7)
        rows = [("full", optimizer) for optimizer in OPTIMIZERS]
        rows += [(tune, "adamw") for tune in TUNES if tune != "full"] + [("lora", "adamw_8bit, no average")]
        for tune, optimizer in rows:
            policy = PolicyConfig(model=model)
            found = measure(TrainConfig(policy=policy, tune=TUNES[tune], optim=OPTIMIZERS[optimizer]))
            gradient, held = found.pop("gradient"), sum(found.values())
            sizes = [*(found[part] for part in ("trained", "optimizer", "average", "frozen")), held, held + gradient]
            cells = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
            print(f"| {tune}: {optimizer} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
