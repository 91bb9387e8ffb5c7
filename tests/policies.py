"""A tiny tabletop policy with random weights, for the tests of inference and evaluation."""

from pathlib import Path

import numpy as np

from pi0_jax.checkpoint import Assets, CheckpointWriter
from pi0_jax.config import DataConfig, PolicyConfig, TrainConfig
from pi0_jax.data.normalization import NormStats, stats_to_json
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.pi0 import make_objective
from pi0_jax.sampler import Euler
from tests.conftest import tiny_config
from tests.model.common import random_params

STATS = {
    "state": NormStats(*np.array([[0.0] * 6, [0.1] * 6, [-0.2] * 6, [0.2] * 6, [-0.3] * 6, [0.3] * 6])),
    "actions": NormStats(*np.array([[0.01] * 3, [0.02] * 3, [-0.04] * 3, [0.04] * 3, [-0.04] * 3, [0.04] * 3])),
}
MODEL = tiny_config(action_dim=8, vocab_size=512, prompt_length=24)
TINY = PolicyConfig(model=MODEL, robot="tabletop", sampler=Euler(3))


def tiny_params(config: PolicyConfig):
    """Random parameters, without the compiling that the network's own initial values would take."""
    return random_params(make_objective(config.objective, config.model).network, np.random.default_rng(0))


def save_tiny_checkpoint(run: Path, params=None, **changes) -> Path:
    """Writes a run with one checkpoint, of step 3.

    Args:
        run: a new folder.
        params: the weights; None: random ones.
        changes: replace parts of its assets.
    """
    policy = changes.get("policy", TINY)
    tokenizer = Tokenizer.train(["reach the red block", "push the blue ball onto the yellow circle"], 512)
    train = TrainConfig(policy=policy, data=DataConfig(validation_path=None))
    assets = Assets(policy, stats_to_json(STATS), tokenizer.model, train)._replace(**changes)
    with CheckpointWriter(run, keep=1) as writer:
        writer.save(3, tiny_params(policy) if params is None else params, assets)
        writer.wait()
    return run
