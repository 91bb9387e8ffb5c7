"""A run that is stopped in any way and resumed reads as if it had never stopped, and every stop says what to do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pi0_jax import checkpoint
from pi0_jax.config import AugmentConfig, DataConfig, MeshConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.training import loop
from pi0_jax.training.guard import Diverged
from pi0_jax.training.inputs import load_inputs
from pi0_jax.training.interrupt import Interrupted
from pi0_jax.training.loop import run
from pi0_jax.training.metrics import Reporter
from tests.conftest import tiny_config
from tests.data.conftest import write

STEPS = 7


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """Runs that differ in their folders alone share a program: tracing it takes longer than a few updates do."""
    built, build = {}, loop.build

    def build_once(run, augment):
        which = repr(dataclasses.replace(run.config, run_dir="", resume=False, overwrite=False, save_every=1))
        if which not in built:
            built[which] = build(run, augment)
        return built[which]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", build_once)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("loop")
    model = tiny_config("pi0", cameras=("top",), action_dim=8, vocab_size=512, prompt_length=16)
    return TrainConfig(
        policy=PolicyConfig(robot="tabletop", model=model),
        optim=OptimConfig(name="adamw", peak_lr=1e-3, warmup_steps=2, decay_steps=STEPS, ema_decay=0.9),
        data=DataConfig(str(write(folder / "data")), str(write(folder / "held_out", (5,)))),
        run_dir=str(folder / "reference"),
        batch_size=8,
        num_steps=STEPS,
        log_every=2,
        validate_every=3,
        save_every=4,
        keep_checkpoints=5,
    )


@pytest.fixture(scope="module")
def reference(config) -> Path:
    """The last checkpoint of a run that never stopped."""
    return run(config)


@pytest.fixture
def fresh(config, tmp_path) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(tmp_path / "run"))


def rows(run_dir: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def at_step(monkeypatch, step: int, action):
    """Calls `action` when the update `step` has been started."""
    push = Reporter.push

    def patched(self, number, metrics):
        push(self, number, metrics)
        if number == step:
            action()

    monkeypatch.setattr(Reporter, "push", patched)


def test_every_checkpoint_holds_weights_optimizer_iterator_statistics_tokenizer_and_configuration(config, reference):
    assert reference.name == str(STEPS)
    assert sorted(int(p.name) for p in reference.parent.iterdir()) == [4, 7]
    for step in reference.parent.iterdir():
        assert {"params", "train_state", "data_state", "assets"} <= {p.name for p in step.iterdir()}
        assets = checkpoint.load_assets(step)
        assert assets.train == config
        assert assets.tokenizer is not None
        assert Tokenizer(assets.tokenizer).vocab_size <= 512
        assert assets.norm_stats is not None
        assert len(assets.norm_stats["norm_stats"]["actions"]["mean"]) == 3
    steps = [row["step"] for row in rows(config.run_dir)]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7]
    assert {"loss", "grad_norm", "param_norm", "learning_rate"} < set(rows(config.run_dir)[0])


def test_a_run_killed_at_any_step_resumes_to_the_same_rows(fresh, reference, tmp_path):
    step = random.randrange(1, STEPS)
    (tmp_path / "config").write_bytes(pickle.dumps(fresh))
    program = f"""
import os, pickle, signal
from pathlib import Path
import pytest
from pi0_jax.training.loop import run
from tests.conftest import quick_runs
from tests.training.test_loop import at_step
quick_runs(pytest.MonkeyPatch())
at_step(pytest.MonkeyPatch(), {step}, lambda: os.kill(os.getpid(), signal.SIGKILL))
run(pickle.loads(Path({str(tmp_path / "config")!r}).read_bytes()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    last = run(dataclasses.replace(fresh, resume=True))
    assert rows(fresh.run_dir) == rows(reference.parents[1]), f"killed at step {step}"
    same = jax.tree.map(np.array_equal, checkpoint.restore_params(last), checkpoint.restore_params(reference))
    assert all(jax.tree.leaves(same))


def test_ctrl_c_finishes_the_step_saves_and_says_so_and_resume_continues(fresh, reference, monkeypatch):
    with monkeypatch.context() as patch:
        # The handler runs when the interpreter looks for signals, which on a busy machine may be after the call.
        at_step(patch, 5, lambda: (signal.raise_signal(signal.SIGINT), time.sleep(0.05)))
        with pytest.raises(Interrupted, match=r"step 5.*checkpoints/5.*--resume") as stopped:
            run(fresh)
    assert stopped.value.exit_code == 130
    assert checkpoint.latest_step(fresh.run_dir) == 5
    run(dataclasses.replace(fresh, resume=True))
    assert rows(fresh.run_dir) == rows(reference.parents[1])


def test_updates_that_are_not_finite_are_skipped_and_then_stop_with_step_and_last_good_checkpoint(fresh, monkeypatch):
    def load(*args, **kwargs):
        inputs = load_inputs(*args, **kwargs)
        return inputs._replace(loader=Poisoned(inputs.loader, steps=(2, 3)))

    monkeypatch.setattr("pi0_jax.training.loop.load_inputs", load)
    with pytest.raises(Diverged, match=r"step 3, after skipping 1 .*checkpoints/2\. Lower --optim\.peak-lr"):
        run(dataclasses.replace(fresh, save_every=1, max_consecutive_skips=1))
    assert [(row["step"], row["skipped"]) for row in rows(fresh.run_dir)] == [(1, 0), (2, 1), (3, 1)]
    for leaf in jax.tree.leaves(checkpoint.restore_params(fresh.run_dir)):
        assert np.isfinite(leaf).all()


class Poisoned:
    """A loader with NaN among the actions of some steps."""

    def __init__(self, loader, steps: tuple[int, ...]):
        self.loader, self.count, self.steps = loader, itertools.count(1), steps

    def __next__(self):
        batch = next(self.loader)
        return batch._replace(actions=batch.actions * np.nan) if next(self.count) in self.steps else batch

    def get_state(self):
        return self.loader.get_state()


def test_a_run_can_start_from_the_weights_and_tokenizer_of_another(fresh, reference, caplog):
    caplog.set_level("INFO")
    last = run(dataclasses.replace(fresh, init_from=str(reference), num_steps=2, log_every=1, profile="2:3"))
    assert list((Path(fresh.run_dir) / "profile").rglob("*.xplane.pb"))
    assert "programs in" in caplog.text
    assert "; none twice" in caplog.text
    pairs = zip(*(jax.tree.leaves(checkpoint.restore_params(path)) for path in (last, reference)), strict=True)
    assert max(float(abs(a - b).max()) for a, b in pairs) < 3e-4  # Adam's first steps are 3e-4, and the average a tenth
    assert checkpoint.load_assets(last).tokenizer == checkpoint.load_assets(reference).tokenizer


def test_overwrite_starts_anew_but_deletes_nothing_before_the_data_is_known_to_be_good(config, fresh, reference):
    shutil.copytree(config.run_dir, fresh.run_dir)
    with pytest.raises(FileNotFoundError):
        run(dataclasses.replace(fresh, overwrite=True, data=DataConfig("nowhere")))
    assert checkpoint.latest_step(fresh.run_dir) == STEPS
    run(dataclasses.replace(fresh, overwrite=True, num_steps=1))
    assert rows(fresh.run_dir)[0] == rows(reference.parents[1])[0]
    assert [p.name for p in (Path(fresh.run_dir) / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"save_every": 0}, "save_every is 0"),
        ({"batch_size": 12, "mesh": MeshConfig(fsdp=8)}, "--batch-size 8"),
        ({"optim": OptimConfig(decay_steps=9)}, r"--optim\.warmup-steps"),
        ({"policy": PolicyConfig(robot="tabletpo")}, "Did you mean 'tabletop'"),
        ({"init_from": "nowhere"}, "no checkpoint at.*pi0 convert pi05_base nowhere --tokenizer"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_compiled(fresh, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(dataclasses.replace(fresh, **fields))


def test_a_finished_run_resumes_to_its_end_at_once(config, reference):
    before = rows(config.run_dir)
    assert run(dataclasses.replace(config, resume=True)) == reference
    assert rows(config.run_dir) == before
    assert os.path.exists(reference)


def test_symmetries_that_the_prompt_would_not_follow_are_refused(fresh):
    model = dataclasses.replace(fresh.policy.model, variant="pi05")
    policy = dataclasses.replace(fresh.policy, model=model)
    with pytest.raises(ValueError, match="reads it from the prompt"):
        run(dataclasses.replace(fresh, policy=policy, augment=AugmentConfig(square_symmetries=True)))


def test_a_run_of_version_1_resumes_to_the_losses_that_version_1_gave(tmp_path, monkeypatch):
    goldens = Path(__file__).parents[1] / "goldens"
    with tarfile.open(goldens / "version1_run.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    monkeypatch.chdir(tmp_path)  # its folders are relative
    write(Path("data"), (0, 1, 2))
    train = checkpoint.load_assets("run").train
    assert train is not None
    run(dataclasses.replace(train, num_steps=8, resume=True))
    found, expected = rows("run"), json.loads((goldens / "version1_rows.json").read_text())
    expected = [row for row in expected if row["step"] > 4]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, then in zip(found, expected, strict=True):
        assert row == pytest.approx(then, rel=1e-5)
