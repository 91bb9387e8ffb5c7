"""Bytes that training holds from step to step at full size, by what trains and by optimizer, for docs/memory.md:

    python benchmarks/memory.py

Exact: from the shapes of the state (`jax.eval_shape`), on one device. Activations are not in it; `pi0 plan` has them.
"""

from __future__ import annotations

import jax

from pi0_jax.checkpoint import tree_bytes
from pi0_jax.config import PI0, PI05, OptimConfig, PolicyConfig, TrainConfig, TuneConfig
from pi0_jax.plan.compile import build_program
from pi0_jax.training.state import TrainState

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
    return build_program(config, jax.devices()[:1])[1].shapes


def measure(config: TrainConfig) -> dict[str, int]:
    """Bytes of a run's state by kind, and of the gradient, which an update makes besides."""
    state = state_of(config)
    kinds = {"trained": state.params, "frozen": state.frozen, "optimizer": state.opt_state, "average": state.ema}
    return {name: tree_bytes(tree) for name, tree in (kinds | {"gradient": state.params}).items()}


def main() -> None:
    for name, model in (("π0", PI0), ("π0.5", PI05)):
        print(f"\n| {name} | trained | optimizer | average | frozen | state | and gradient |\n|" + "---|" * 7)
        rows = [("full", optimizer) for optimizer in OPTIMIZERS]
        rows += [(tune, "adamw") for tune in TUNES if tune != "full"] + [("lora", "adamw_8bit, no average")]
        for tune, optimizer in rows:
            policy = PolicyConfig(robot="aloha", model=model)
            found = measure(TrainConfig(policy=policy, tune=TUNES[tune], optim=OPTIMIZERS[optimizer]))
            gradient, held = found.pop("gradient"), sum(found.values())
            sizes = [*(found[kind] for kind in ("trained", "optimizer", "average", "frozen")), held, held + gradient]
            cells = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
            print(f"| {tune}: {optimizer} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
