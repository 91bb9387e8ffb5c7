"""A run starts, resumes or overwrites only where that is what the user means, and says why not otherwise."""

from __future__ import annotations

import dataclasses
import shutil

import jax.numpy as jnp
import pytest

from pi0_jax.checkpoint import Assets, CheckpointWriter
from pi0_jax.config import MeshConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.training.run_dir import delete_run, differences, open_run


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(policy=PolicyConfig(robot="tabletop"), run_dir=str(tmp_path / "run"))


@pytest.fixture
def trained(config) -> TrainConfig:
    """A config whose folder holds a run with checkpoints 10 and 20."""
    with CheckpointWriter(config.run_dir, keep=2) as writer:
        for step in (10, 20):
            writer.save(step, {"w": jnp.zeros(3)}, Assets(config.policy, None, None, config))
    return config


def changed(config, **fields):
    return dataclasses.replace(config, **fields)


def test_a_new_folder_is_made(config, tmp_path):
    assert open_run(config) is None
    assert (tmp_path / "run").is_dir()


def test_a_folder_with_a_run_is_refused_and_the_ways_out_are_named(trained):
    with pytest.raises(FileExistsError, match=r"newest checkpoint: 20.*--resume.*--overwrite.*--run-dir"):
        open_run(trained)


def test_overwrite_deletes_the_run_and_nothing_else(trained, tmp_path):
    run = tmp_path / "run"
    (run / "notes.txt").write_text("mine")
    (run / "metrics.jsonl").write_text("{}")
    assert open_run(changed(trained, overwrite=True)) is None
    delete_run(run)
    assert [p.name for p in run.iterdir()] == ["notes.txt"]


def test_resume_takes_the_newest_checkpoint(trained, tmp_path):
    assert open_run(changed(trained, resume=True)) == tmp_path / "run" / "checkpoints" / "20"


def test_resume_passes_over_a_damaged_checkpoint_and_says_which(trained, tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoints"
    (shard,) = (path for path in (folder / "20" / "params" / "d").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert open_run(changed(trained, resume=True)) == folder / "10"
    assert f"{shard} is not what was written" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20.damaged"]
    shutil.rmtree(folder / "10" / "params")
    assert open_run(changed(trained, resume=True)) is None


def test_resume_without_a_run_says_so(config):
    with pytest.raises(FileNotFoundError, match="there is no run"):
        open_run(changed(config, resume=True))


def test_resume_of_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert open_run(changed(config, resume=True)) is None


def test_resume_names_every_field_that_differs(trained):
    other = changed(trained, resume=True, seed=3, optim=OptimConfig(peak_lr=1e-3))
    with pytest.raises(
        ValueError, match=r"optim\.peak_lr: 2\.5e-05 then, 0\.001 now\n  seed: 0 then, 3 now"
    ) as refused:
        open_run(other)
    assert "start anew from the weights: --init-from" in str(refused.value)


def test_resume_may_change_what_does_not_change_an_update(trained):
    model = changed(trained.policy.model, remat="none", attention="cudnn")
    policy = changed(trained.policy, model=model)
    open_run(changed(trained, resume=True, num_steps=50, save_every=7, mesh=MeshConfig(fsdp=2), policy=policy))


def test_resume_of_a_longer_run_warns_that_the_learning_rate_changes(trained, caplog):
    open_run(changed(trained, resume=True, num_steps=50))
    assert "learning rate" in caplog.text


def test_resume_and_overwrite_together_are_refused(trained):
    with pytest.raises(ValueError, match="one of them"):
        open_run(changed(trained, resume=True, overwrite=True))


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to the run's folder"):
        open_run(changed(config, run_dir=str(tmp_path / "file" / "run")))


def test_differences_are_found_at_any_depth(config):
    model = dataclasses.replace(config.policy.model, cameras=("one",))
    other = changed(config, policy=dataclasses.replace(config.policy, model=model))
    assert list(differences(config, other)) == ["policy.model.cameras"]
    assert differences(config, config) == {}
