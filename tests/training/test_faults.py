"""Whatever happens to a run, taking it up again gives the losses of one to which nothing happened.

What can go wrong lies around the network, so two layers stand in for it here, and a killed process costs little;
`test_loop.py` and `test_multihost.py` do the same with a whole one. PI0_KILLS=100: more kills than 12.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax import checkpoint
from pi0_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.training.loop import run
from tests.conftest import tiny_config
from tests.data.conftest import write
from tests.training.test_loop import at_step, rows

KILLS = int(os.environ.get("PI0_KILLS", "12"))
STEPS = 3 * KILLS
"""As many as the killed processes may make together, at most."""
SAVE_EVERY = STEPS // 6


class TwoLayers(NamedTuple):
    """A velocity from all that a batch holds; its checkpoints are large enough for a disk to fill in them."""

    config: ModelConfig

    def init(self, key):
        c, init = self.config, nn.initializers.normal(0.1)
        width = 2 * c.action_dim + len(c.cameras) + c.prompt_length + 1
        init = nn.with_logical_partitioning(init, ("embed", "heads"))
        keys = jax.random.split(key)
        return {"in": init(keys[0], (width, 1024)), "out": init(keys[1], (1024, c.action_dim))}

    def unrolled(self, params):
        return params

    def joint(self, params, observation, x, time, span=None):
        pixels = [image.mean((1, 2, 3))[:, None] for image in observation.images.values()]
        seen = jnp.concatenate([observation.state, *pixels, observation.prompt / self.config.vocab_size], -1)
        seen = jnp.broadcast_to(seen.reshape(len(seen), *(1,) * (x.ndim - 2), -1), (*x.shape[:-1], seen.shape[-1]))
        time = jnp.broadcast_to(time[..., None, None], (*x.shape[:-1], 1))
        return nn.gelu(jnp.concatenate([x, seen, time], -1) @ params["in"]) @ params["out"]

    def prefill(self, params, observation):
        return observation

    def velocity(self, params, prefix, x, time, span=None, features=None):
        return self.joint(params, prefix, x, time)

    def time_features(self, params, time, span=None):
        return None


KILLER = """
import dataclasses, json, os, pathlib, pickle, random, signal, sys, threading, time, traceback
import pytest
from pi0_jax.checkpoint import CheckpointWriter
from pi0_jax.training.loop import run
from tests.conftest import quick_runs
from tests.training.test_faults import TwoLayers
from tests.training.test_loop import at_step

config = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
folder = pathlib.Path(config.run_dir) / "checkpoints"
random.seed(int(sys.argv[3]))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_in(seconds):
    threading.Thread(target=lambda: (time.sleep(seconds), die()), daemon=True).start()

def die_while_writing():
    def watch():
        while not any(folder.glob("*tmp*")):
            time.sleep(0.001)
        die()
    threading.Thread(target=watch, daemon=True).start()

def train(number):
    kind = ("start", "step", "save", "write")[number % 4]
    patch = pytest.MonkeyPatch()
    patch.setattr("pi0_jax.objective.gaussian.make_head", TwoLayers)
    quick_runs(patch)
    if kind == "start":
        die_in(random.uniform(0, 2))
    first = max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0)
    # A process that lives longer than it should still does not go too far.
    at_step(patch, first + (random.randint(1, 3) if kind == "step" else 3), die)
    if kind == "save":
        save, delay = CheckpointWriter.save, random.uniform(0, 0.1)
        patch.setattr(CheckpointWriter, "save", lambda *args, **kwargs: (die_in(delay), save(*args, **kwargs)))
    if kind == "write":
        save = CheckpointWriter.save
        patch.setattr(CheckpointWriter, "save", lambda *args, **kwargs: (die_while_writing(), save(*args, **kwargs)))
    run(dataclasses.replace(config, resume=folder.exists()))

saving = 0
for number in range(int(sys.argv[2])):  # a fork of what has only been imported starts in no time
    child = os.fork()
    if not child:
        try:
            train(number)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"process {number} ended by itself"
    saving += any(folder.glob("*tmp*"))
print(json.dumps({"saving": saving}))
"""


@pytest.fixture(scope="module", autouse=True)
def _two_layers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pi0_jax.objective.gaussian.make_head", TwoLayers)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("faults")
    model = tiny_config("pi0", cameras=("top",), depth=1, action_dim=8, vocab_size=512, prompt_length=16)
    return TrainConfig(
        policy=PolicyConfig(robot="tabletop", model=model),
        optim=OptimConfig(name="adamw", peak_lr=1e-3, warmup_steps=2, decay_steps=STEPS, ema_decay=0.9),
        data=DataConfig(str(write(folder / "data"))),
        run_dir=str(folder / "reference"),
        batch_size=8,
        num_steps=STEPS,
        log_every=20,
        save_every=SAVE_EVERY,
        keep_checkpoints=6,
    )


@pytest.fixture(scope="module")
def reference(config) -> Path:
    """A run to which nothing happened."""
    run(config)
    return Path(config.run_dir)


@pytest.fixture
def fresh(config, tmp_path) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(tmp_path / "run"))


@pytest.fixture
def stopped(config, reference, tmp_path) -> TrainConfig:
    """A copy of the reference, to be resumed."""
    shutil.copytree(reference, tmp_path / "run")
    return dataclasses.replace(config, run_dir=str(tmp_path / "run"), resume=True)


def assert_same_run(config: TrainConfig, reference: Path):
    """That a run has the rows of the reference, bit for bit, and at its end the weights."""
    assert rows(config.run_dir) == rows(reference)[: config.num_steps]
    folders = (path / "checkpoints" / str(config.num_steps) for path in (Path(config.run_dir), reference))
    pairs = zip(*(jax.tree.leaves(checkpoint.restore_params(folder)) for folder in folders), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_run_that_is_killed_again_and_again_gives_the_rows_of_one_that_is_not(fresh, reference, tmp_path):
    fresh = dataclasses.replace(fresh, save_every=2, keep_checkpoints=3)
    (tmp_path / "config").write_bytes(pickle.dumps(fresh))
    seed = int.from_bytes(os.urandom(3), "big")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "config"), str(KILLS), str(seed)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    assert json.loads(done.stdout.splitlines()[-1])["saving"] >= KILLS // 10, f"seed {seed}"
    run(dataclasses.replace(fresh, resume=True))
    assert_same_run(fresh, reference)


def limit_files(tmp_path: Path):
    """Lets no file grow beyond what metrics take: writes fail as on a full disk, in whatever thread."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill_disk(tmp_path: Path):
    """Fills the disk of the run."""
    filler = tmp_path / "disk" / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    with filler.open("r+b") as file:  # room for a row of metrics, and for no checkpoint
        file.truncate(filler.stat().st_size - 32_768)
    return filler.unlink


@pytest.mark.parametrize("fill", [limit_files, fill_disk])
def test_a_disk_that_is_full_during_a_save_is_reported_within_a_step(fill, fresh, reference, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    mounted = fill is fill_disk
    if mounted:
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path / "disk")]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk takes root")
    fresh = dataclasses.replace(
        fresh, run_dir=str(tmp_path / "disk" / "run"), keep_checkpoints=1, save_every=2, num_steps=SAVE_EVERY
    )
    empty = []

    def fill_after_the_save():
        while checkpoint.steps(fresh.run_dir) != [4]:  # written, and the one before it deleted
            time.sleep(0.01)
        empty.append(fill(tmp_path))

    try:
        with monkeypatch.context() as patch:
            # The check before each save would see it coming.
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
            at_step(patch, 5, fill_after_the_save)
            with pytest.raises(OSError, match=r"could not save a checkpoint .*checkpoints/4 is complete"):
                run(fresh)
        empty.pop()()
        assert 6 <= len(rows(fresh.run_dir)) <= 8  # the save of step 6 failed
        assert checkpoint.steps(fresh.run_dir) == [4]
        run(dataclasses.replace(fresh, resume=True))
        assert_same_run(fresh, reference)
        assert not list(Path(fresh.run_dir).glob("checkpoints/*tmp*"))
    finally:
        while empty:
            empty.pop()()
        if mounted:
            subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("item", ["params", "train_state", "data_state"])
def test_a_shard_that_changed_on_the_disk_costs_the_steps_since_the_checkpoint_before(item, stopped, reference, caplog):
    newest = Path(stopped.run_dir) / "checkpoints" / str(STEPS)
    shard = max((path for path in (newest / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 16
    shard.write_bytes(content)
    assert run(stopped) == newest
    assert f"{shard} is not what was written" in caplog.text
    assert f"checkpoint before it is {newest.with_name(str(STEPS - SAVE_EVERY))}" in caplog.text
    assert_same_run(stopped, reference)


def test_another_number_of_devices_goes_on_within_rounding(stopped, reference):
    newest = Path(stopped.run_dir) / "checkpoints" / str(STEPS)
    shutil.rmtree(newest)
    run(dataclasses.replace(stopped, mesh=MeshConfig(data=2, fsdp=4)))
    found, expected = (np.array([row["loss"] for row in rows(p)]) for p in (stopped.run_dir, reference))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    before = STEPS - SAVE_EVERY
    np.testing.assert_array_equal(found[:before], expected[:before])
    assert newest.is_dir()
