"""Tiny random checkpoints of every model, in our format, for the tests of conversion."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

from pi0_jax.config import (
    Autoregressive,
    Compact,
    Cosine,
    ExpertConfig,
    Gaussian,
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    Shortcut,
    Tokens,
)
from pi0_jax.convert.formats import OpenCheckpoint, write_checkpoint
from pi0_jax.convert.lazy import in_memory
from pi0_jax.convert.parameters import parameters
from pi0_jax.sampler import Greedy
from tests.conftest import tiny_config

MODELS = ("pi0", "pi05", "pi0_fast", "pi0_lora")
STATS = {
    "norm_stats": {
        key: {"mean": [0.1, 1 / 3], "std": [1.0, 2.0], "q01": [-1.1, -2 / 3], "q99": [1.3, 2.0]}
        for key in ("state", "actions")
    }
}


def tiny_model(name: str) -> ModelConfig:
    """A model of odd sizes, so that hardly any two axes are of one length. `pi0_lora` is π0 with adapters."""
    model = tiny_config(
        name.removesuffix("_lora"),
        language=ExpertConfig(width=20, mlp_dim=44),
        action=ExpertConfig(width=14, mlp_dim=34),
        vocab_size=51,
    )
    if not name.endswith("_lora"):
        return model
    adapters = {"lora_attn_rank": 3, "lora_mlp_rank": 5, "lora_scale": 2.0}
    experts = {e: dataclasses.replace(getattr(model, e), **adapters) for e in ("language", "action")}
    return dataclasses.replace(model, **experts)


def tiny_weights(
    name: str,
    dtype=np.float32,
    seed: int = 0,
    model: ModelConfig | None = None,
    objective: ObjectiveConfig = Gaussian(),
) -> OpenCheckpoint:
    """Random weights of `tiny_model(name)`, or of another model, in memory."""
    model, rng = model or tiny_model(name), np.random.default_rng(seed)
    tensors = {
        path: in_memory((0.3 * rng.normal(size=parameter.shape)).astype(dtype))
        for path, parameter in parameters(model, objective).items()
    }
    normalization = "zscore" if name.startswith("pi0_l") else "quantile"
    fast = {"objective": Autoregressive(), "sampler": Greedy()} if model.variant == "pi0_fast" else {}
    how = {"objective": objective, "robot": "arm", "normalization": normalization} | fast
    policy = PolicyConfig(model=model, **how)
    return OpenCheckpoint("pi0", Path("memory"), policy, tensors, STATS, b"\x00a tokenizer\xff")


HEADS = {
    "Compact": ({"head": Compact(width=12, depth=2, time_width=8)}, Gaussian()),
    "Tokens": ({}, Tokens(bins=6)),
    "Shortcut": ({}, Shortcut()),
    "noise": ({}, Gaussian(path=Cosine(), predicts="noise")),
}


def tiny_weights_of_head(head: str, seed: int = 0) -> OpenCheckpoint:
    """Random weights of a policy that exists only here, in memory."""
    changes, objective = HEADS[head]
    weights = tiny_weights("pi0", seed=seed, model=tiny_config("pi0", **changes), objective=objective)
    return weights._replace(tokenizer=None)


def save_tiny(folder: Path, name: str, dtype=np.float32, seed: int = 0) -> Path:
    """Writes `tiny_weights` as a checkpoint of ours."""
    write_checkpoint(tiny_weights(name, dtype, seed), folder, "pi0")
    return folder


DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
