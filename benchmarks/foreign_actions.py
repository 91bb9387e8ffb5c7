"""How far ten-step actions of other frameworks are from ours, with the same weights, at reduced size, float32.

    lerobot-env/bin/python benchmarks/foreign_actions.py lerobot
    openpi-env/bin/python benchmarks/foreign_actions.py openpi-torch

It runs where `pi0 convert --verify-with` does (docs/checkpoints.md says how to make the environments), and by the same
code. Weights are normal with several standard deviations; an initialiser's is about 0.2 at this size. Each line gives
the largest difference over two seeds: `plain` where each implementation keeps to its own flow times, and `same_times`
where ours takes the other's, as `--verify-with` does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from pi0_jax.config import ExpertConfig, ModelConfig, PolicyConfig, VisionConfig
from pi0_jax.convert.formats import OpenCheckpoint, write_checkpoint
from pi0_jax.convert.lazy import in_memory
from pi0_jax.convert.parameters import parameters
from pi0_jax.convert.verify import agree

MODEL = ModelConfig(
    vision=VisionConfig(width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16, patch_size=8),
    language=ExpertConfig(width=20, mlp_dim=44),
    action=ExpertConfig(width=14, mlp_dim=34),
    depth=2,
    num_heads=8,  # both frameworks write 8 into their attention
    num_kv_heads=1,
    head_dim=8,
    vocab_size=51,
    cameras=("base", "left", "right"),
    action_dim=5,
    action_horizon=6,
    prompt_length=7,
    dtype="float32",
    remat="none",
)


def main() -> None:
    """Prints one JSON object a variant and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("lerobot", "openpi-torch"))
    framework = parser.parse_args().framework
    for variant in ("pi0", "pi05"):
        for deviation in (0.1, 0.3, 0.45, 0.6):
            found = [differences(framework, random_weights(variant, deviation, seed)) for seed in range(2)]
            worst = {name: float(f"{max(each[name] for each in found):.2g}") for name in found[0]}
            print(json.dumps({"variant": variant, "deviation": deviation, **worst}), flush=True)


def differences(framework: agree.Framework, weights: OpenCheckpoint) -> dict[str, float]:
    """Largest differences of the actions, and the largest action."""
    inputs = agree.example(weights.policy.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy"
        write_checkpoint(weights, path, framework)
        theirs = agree.run(weights._replace(format=framework, path=path), inputs, framework).actions
    found = {"plain": agree.run_ours(weights, inputs), "same_times": agree.run(weights, inputs, framework)}
    largest = {name: float(np.abs(trace.actions - theirs).max()) for name, trace in found.items()}
    return largest | {"largest_action": float(np.abs(theirs).max())}


def random_weights(variant, deviation: float, seed: int) -> OpenCheckpoint:
    """Normal weights of a small model, in memory."""
    model = ModelConfig(**{**vars(MODEL), "variant": variant})
    rng = np.random.default_rng(seed)
    tensors = {
        path: in_memory((deviation * rng.normal(size=parameter.shape)).astype(np.float32))
        for path, parameter in parameters(model).items()
    }
    return OpenCheckpoint(
        "pi0", Path("random"), PolicyConfig(robot="none", model=model, normalization="quantile"), tensors
    )


if __name__ == "__main__":
    main()
