"""Saves keep what they should, fail in one message, and leave nothing half-written."""

from __future__ import annotations

import collections
import os
import resource
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from pi0_jax import checkpoint
from pi0_jax.checkpoint import CheckpointError, CheckpointWriter
from tests.checkpoint.common import ASSETS, assert_same, train_state, weights


def test_only_the_newest_stay_and_a_folder_means_its_newest(run):
    folder = run / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["20", "30"]
    assert checkpoint.latest_step(run) == checkpoint.latest_step(folder) == 30
    assert checkpoint.resolve(run) == checkpoint.resolve(folder) == checkpoint.resolve(folder / "30") == folder / "30"
    assert_same(checkpoint.restore_params(folder / "20"), weights(20))


def test_newest_best_and_regular_checkpoints_stay(tmp_path):
    losses = {2: 0.5, 4: 0.1, 6: 0.3, 8: None, 10: 0.4, 12: 0.2, 14: 0.6}
    for some in ((2, 4, 6), (8, 10, 12, 14)):  # what is best is known after a resume too
        with CheckpointWriter(tmp_path, keep=1, keep_every=6, keep_best=2) as writer:
            for step in some:
                writer.save(step, weights(step), ASSETS, validation_loss=losses[step])
                writer.wait()
    assert checkpoint.steps(tmp_path) == [4, 6, 12, 14]
    assert_same(checkpoint.restore_params(tmp_path / "checkpoints" / "4"), weights(4))


def test_donating_arrays_after_a_save_changes_nothing_on_disk(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"w": jnp.zeros(1_000_000)}
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, params, ASSETS)
        for _ in range(20):
            params = bump(params)
        jax.block_until_ready(params)
    assert_same(checkpoint.restore_params(tmp_path), {"w": jnp.zeros(1_000_000)})


def test_a_failed_save_surfaces_at_the_next_call_and_harms_nothing(tmp_path):
    big = {"w": jax.random.normal(jax.random.key(0), (500_000,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, weights(1), ASSETS, train_state(1))
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            writer.save(2, big, ASSETS)
            with pytest.raises(OSError, match=r"could not save.*1 is complete"):
                collections.deque(iter(writer.check, "never"), 0)  # as a run does, step after step
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
        writer.save(3, weights(3), ASSETS, train_state(3))
    assert_same(checkpoint.restore_params(tmp_path), weights(3))


def test_an_output_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        CheckpointWriter(tmp_path / "file" / "run", keep=1)


def test_a_save_killed_midway_leaves_the_checkpoint_before_it(tmp_path):
    program = f"""
        import jax.numpy as jnp, os, sys
        sys.path.insert(0, {os.getcwd()!r})
        from pi0_jax.checkpoint import CheckpointWriter
        from tests.checkpoint import common as t
        writer = CheckpointWriter({str(tmp_path)!r}, keep=1)
        writer.save(1, t.weights(1), t.ASSETS, t.train_state(1), {{}})
        writer.wait()
        writer.save(2, {{"w": jnp.arange(30_000_000.0)}}, t.ASSETS, t.train_state(2), {{}})
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "checkpoints"
    assert any("tmp" in p.name for p in folder.iterdir())
    assert checkpoint.latest_step(tmp_path) == 1
    assert_same(checkpoint.restore_params(tmp_path), weights(1))
    with pytest.raises(CheckpointError, match="never finished"):
        checkpoint.restore_params(next(p for p in folder.iterdir() if "tmp" in p.name))
    CheckpointWriter(tmp_path, keep=1)
    assert [p.name for p in folder.iterdir()] == ["1"]
