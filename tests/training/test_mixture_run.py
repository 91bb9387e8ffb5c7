"""A run on a mixture of formats that is stopped and resumed reads as if it had never stopped."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from pi0_jax import checkpoint
from pi0_jax.config import DataConfig, DatasetConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.data.normalize import semantics_from_json
from pi0_jax.training.interrupt import Interrupted
from pi0_jax.training.loop import run
from tests.conftest import tiny_config
from tests.data.conftest import write
from tests.data.formats import RLDS_KEYS, write_rlds
from tests.training.test_loop import at_step, rows


def test_a_run_on_lerobot_and_rlds_resumes_to_the_same_rows_and_weights(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    datasets = (
        DatasetConfig(str(write(tmp_path / "lerobot")), weight=0.5),
        DatasetConfig(str(write_rlds(tmp_path / "rlds")), weight=0.5, keys=RLDS_KEYS),
    )
    model = tiny_config("pi0", cameras=("top",), action_dim=8, vocab_size=512, prompt_length=16)
    config = TrainConfig(
        policy=PolicyConfig(model=model),
        optim=OptimConfig(name="adamw", peak_lr=1e-3, warmup_steps=2, decay_steps=7, ema_decay=0.9),
        data=DataConfig(datasets=datasets, validation_share=0.4),
        run_dir=str(tmp_path / "whole"),
        batch_size=8,
        num_steps=4,
        validate_every=2,
    )
    whole = run(config)
    stopped = dataclasses.replace(config, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            run(stopped)
    last = run(dataclasses.replace(stopped, resume=True))
    assert rows(stopped.run_dir) == rows(config.run_dir)
    same = jax.tree.map(np.array_equal, checkpoint.restore_params(last), checkpoint.restore_params(whole))
    assert all(jax.tree.leaves(same))
    assert semantics_from_json(checkpoint.load_assets(last).norm_stats or {}) == {"tabletop": ("absolute",) * 3}
