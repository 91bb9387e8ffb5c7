"""What is saved comes back, nothing half-written is ever taken for a checkpoint, and every refusal says why."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax import checkpoint
from pi0_jax.checkpoint import Assets, CheckpointError, CheckpointWriter, space
from pi0_jax.config import Beta, ConditionDropout, Gaussian, Guidance, ModelConfig, PolicyConfig, TrainConfig
from pi0_jax.sampler import Euler

STATS = {"norm_stats": {"state": {"mean": [0.1, 1 / 3], "std": [1.0, 2.0], "q01": None, "q99": None}}}
TRAIN = TrainConfig(
    policy=PolicyConfig(robot="tabletop", model=ModelConfig(cameras=("a", "b"), variant="pi05")), num_steps=7
)
ASSETS = Assets(TRAIN.policy, STATS, b"\x00tokenizer\xff", TRAIN)


class Moments(NamedTuple):
    count: jax.Array
    mu: dict
    nothing: None = None


def weights(seed=0, shape=(30, 40)):
    return {"layer": {"w": jax.random.normal(jax.random.key(seed), shape)}, "b": jnp.full(5, seed, jnp.float32)}


def train_state(seed=0):
    return {"step": jnp.int32(seed), "opt_state": (Moments(jnp.int32(3), weights(seed + 100)), ())}


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with CheckpointWriter(folder, keep=2) as writer:
        for step in (10, 20, 30):
            writer.save(step, weights(step), ASSETS, train_state(step), {"position": step})
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_everything_comes_back_bit_for_bit(run):
    assert_same(checkpoint.restore_params(run), weights(30))
    state = checkpoint.restore_train_state(run, abstract(train_state()))
    assert_same(state, train_state(30))
    assert isinstance(state["opt_state"][0], Moments)
    assert checkpoint.load_data_state(run) == {"position": 30}
    assert checkpoint.load_assets(run) == ASSETS


def test_only_the_newest_checkpoints_stay_and_a_folder_means_its_newest(run):
    folder = run / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["20", "30"]
    assert checkpoint.latest_step(run) == checkpoint.latest_step(folder) == 30
    assert checkpoint.resolve(run) == checkpoint.resolve(folder) == checkpoint.resolve(folder / "30") == folder / "30"
    assert_same(checkpoint.restore_params(folder / "20"), weights(20))


def test_assets_are_plain_files(run):
    assets = run / "checkpoints" / "30" / "assets"
    assert sorted(p.name for p in assets.iterdir() if p.name != "commit_success.txt") == [
        "config.json",
        "norm_stats.json",
        "tokenizer.model",
    ]
    assert '"variant": "pi05"' in (assets / "config.json").read_text()


def test_weights_can_be_cast_on_the_way_in(run):
    params = checkpoint.restore_params(run, dtype=jnp.bfloat16)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(30)))


def test_weights_alone_make_a_checkpoint_that_training_refuses_to_resume(tmp_path):
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(0, weights(1), Assets(TRAIN.policy, None, None))
    assert_same(checkpoint.restore_params(tmp_path), weights(1))
    assert checkpoint.load_assets(tmp_path) == Assets(TRAIN.policy, None, None, None)
    with pytest.raises(CheckpointError, match=r"weights only.*--init-from"):
        checkpoint.restore_train_state(tmp_path, abstract(train_state()))


def test_what_eight_devices_saved_is_read_by_any_other_number(tmp_path):
    def divided(shape, names):
        mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
        return jax.sharding.NamedSharding(mesh, jax.P(names))

    state = {"w": jax.device_put(jnp.arange(64.0).reshape(16, 4), divided((8,), ("a",)))}
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, state, ASSETS, state)
    for sharding in (divided((2, 4), ("a", "b")), jax.sharding.SingleDeviceSharding(jax.devices()[3])):
        like = {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)}
        for restored in (checkpoint.restore_params(tmp_path, like), checkpoint.restore_train_state(tmp_path, like)):
            assert restored["w"].sharding == sharding
            np.testing.assert_array_equal(restored["w"], state["w"])


def test_changing_or_donating_the_arrays_after_save_changes_nothing_on_disk(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"w": jnp.zeros(1_000_000)}
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, params, ASSETS)
        for _ in range(20):
            params = bump(params)
        jax.block_until_ready(params)
    assert_same(checkpoint.restore_params(tmp_path), {"w": jnp.zeros(1_000_000)})


def test_a_tree_that_does_not_fit_is_refused_with_all_differences(run):
    like = weights()
    like["extra"] = like.pop("b")
    like["layer"]["w"] = jnp.zeros((30, 41))
    with pytest.raises(CheckpointError, match="fit this model") as caught:
        checkpoint.restore_params(run, abstract(like))
    message = str(caught.value)
    assert "missing (1): extra" in message.replace("params/", "")
    assert "unexpected (1): b" in message.replace("params/", "")
    assert "layer/w (30, 40) for (30, 41)" in message


def test_newest_best_and_regular_checkpoints_stay(tmp_path):
    losses = {2: 0.5, 4: 0.1, 6: 0.3, 8: None, 10: 0.4, 12: 0.2, 14: 0.6}
    for some in ((2, 4, 6), (8, 10, 12, 14)):  # what is best is known after a resume too
        with CheckpointWriter(tmp_path, keep=1, keep_every=6, keep_best=2) as writer:
            for step in some:
                writer.save(step, weights(step), ASSETS, validation_loss=losses[step])
                writer.wait()
    assert checkpoint.steps(tmp_path) == [4, 6, 12, 14]
    assert_same(checkpoint.restore_params(tmp_path / "checkpoints" / "4"), weights(4))


def test_every_file_that_changed_is_found_and_named(run, copy):
    step = copy / "checkpoints" / "30"
    checkpoint.verify(step)
    names = json.loads((step / "digests.json").read_text())
    files = [path for path in step.glob("*/**/*") if path.is_file()]
    assert {str(path.relative_to(step)) for path in files} == names.keys()
    for path in files:
        content = path.read_bytes()
        if not content:
            continue
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        found = [number for number in range(3) if damage(step, (number, 3))]
        assert len(found) == 1  # of three processes that share the work one sees it
        assert str(path) in damage(step)
        assert str(step.parent / "20") in damage(step)
        path.write_bytes(content)
    path.unlink()
    assert "is missing" in damage(step)


def damage(step, part=(0, 1)) -> str:
    """What `verify` finds."""
    try:
        checkpoint.verify(step, part)
    except CheckpointError as error:
        return str(error)
    return ""


def test_older_checkpoints_without_digests_are_taken_as_they_are(copy):
    step = copy / "checkpoints" / "30"
    (step / "digests.json").unlink()
    checkpoint.verify(step)
    shutil.rmtree(step / "params")
    with pytest.raises(CheckpointError, match="params is missing"):
        checkpoint.verify(step)


def test_what_is_set_aside_is_no_checkpoint_any_more(copy):
    folder = copy / "checkpoints"
    for name in ("30.damaged", "30.damaged1"):
        assert checkpoint.set_aside(folder / "30") == folder / name
        assert checkpoint.steps(copy) == [20]
        with CheckpointWriter(copy, keep=2) as writer:
            writer.save(30, weights(30), ASSETS)
        assert checkpoint.steps(copy) == [20, 30]
        assert (folder / name).is_dir()


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_damaged_file_is_either_harmless_or_named_with_the_checkpoint_before_it(run, copy, damage):
    step = copy / "checkpoints" / "30"
    refusals = []
    for original in sorted((run / "checkpoints" / "30").rglob("*")):
        if not original.is_file():
            continue
        file = step / original.relative_to(run / "checkpoints" / "30")
        content = file.read_bytes()
        file.unlink() if damage == "delete" else file.write_bytes(content[: len(content) // 2])
        try:
            assert_same(checkpoint.restore_params(step), weights(30))
            assert_same(checkpoint.restore_train_state(step, abstract(train_state())), train_state(30))
            assert checkpoint.load_assets(step)._replace(tokenizer=None) == ASSETS._replace(tokenizer=None)
        except CheckpointError as error:
            refusals.append(str(error))
        file.write_bytes(content)
    assert len(refusals) >= 8
    assert all(str(step) in message and str(step.parent / "20") in message for message in refusals)
    assert_same(checkpoint.restore_params(step), weights(30))


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_damage_is_explained_without_digests_too(copy, name):
    step = copy / "checkpoints" / "30"
    (step / "digests.json").unlink()
    (step / "params" / name).write_bytes((step / "params" / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{step}/params is damaged or incomplete: .*before it is .*20\."):
        checkpoint.restore_params(step)


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


def test_too_little_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.reserve(weights(), num_steps=100)
        with pytest.raises(OSError, match=r"GB free.*--keep-checkpoints"):
            writer.reserve(jax.ShapeDtypeStruct((10**15,), jnp.float32))
        room = shutil.disk_usage(tmp_path).free
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * space.tree_bytes(weights())))
        writer.reserve(weights(), num_steps=100)
    with CheckpointWriter(tmp_path, keep=2, keep_every=10, keep_best=1) as writer:
        writer.reserve(weights(), num_steps=60)  # 2 newest, 1 best, 6 for good, and the one that is being written
        with pytest.raises(OSError, match="GB free"):
            writer.reserve(weights(), num_steps=70)
    assert room > 0


def test_too_little_memory_for_the_copy_of_a_save_is_noticed_before_it_is_made(tmp_path, monkeypatch):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    divided, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("x"), jax.P()))
    # All devices are this process's: a divided array is copied once, and so is one of which each device has a replica.
    state = [jax.ShapeDtypeStruct((1000, 8), jnp.float32, sharding=place) for place in (divided, whole)]
    state.append(np.zeros(1000, np.float32))
    assert space.staged_bytes(state) == 32_000 + 32_000 + 4_000
    with CheckpointWriter(tmp_path, keep=1) as writer:
        monkeypatch.setattr(space, "available_memory", lambda: 68_000)
        writer.reserve(state)
        writer.save(1, weights(), ASSETS)
        writer.wait()
        monkeypatch.setattr(space, "available_memory", lambda: 1_000)
        for attempt in (lambda: writer.reserve(state), lambda: writer.save(2, weights(), ASSETS)):
            with pytest.raises(OSError, match=r"memory available, and a save .* needs a copy of"):
                attempt()
    assert checkpoint.steps(tmp_path) == [1]


def test_memory_that_the_system_says_is_available_is_read():
    available = space.available_memory()
    assert available is None or 2**26 < available < 2**50


def test_an_output_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        CheckpointWriter(tmp_path / "file" / "run", keep=1)


def test_a_save_killed_midway_leaves_the_checkpoint_before_it(tmp_path):
    program = f"""
        import jax.numpy as jnp, os, sys
        sys.path.insert(0, {os.getcwd()!r})
        from tests import test_checkpoint as t
        writer = t.CheckpointWriter({str(tmp_path)!r}, keep=1)
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


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "PyTorch weights"),
        ("weights.npz", "big_vision"),
        ("model.pt", "safetensors"),
        ("params/_METADATA", "openpi checkpoint.*[Cc]onvert"),
        ("meta/info.json", "is a data set, not a checkpoint"),
        ("checkpoints/metadata", "no complete checkpoint yet"),
        ("notes.txt", r"not a pi0_jax checkpoint.*notes\.txt"),
    ],
)
def test_a_folder_that_is_not_ours_is_named_for_what_it_is(tmp_path, file, message):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore_params(tmp_path)


def test_a_missing_path_lists_what_is_there_instead(run):
    with pytest.raises(FileNotFoundError, match=r"31.*20, 30"):
        checkpoint.restore_params(run / "checkpoints" / "31")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 2', '"format_version": 3', "format version 3, and .* reads 1 and 2"),
        ('"depth": 18', '"depht": 18', r"depht.*config\.policy\.model"),
        ('"pi05"', '"pi06"', "pi06"),
    ],
)
def test_a_config_of_another_version_is_refused(copy, old, new, message):
    file = copy / "checkpoints" / "30" / "assets" / "config.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_assets(copy)


@pytest.fixture
def version1(tmp_path):
    """A run that the first version of the format saved."""
    with tarfile.open(Path(__file__).parent / "goldens" / "version1_run.tar.gz") as archive:
        archive.extractall(tmp_path / "version1", filter="data")
    return tmp_path / "version1"


def test_a_checkpoint_of_version_1_is_read(version1):
    checkpoint.verify(checkpoint.resolve(version1))
    assets = checkpoint.load_assets(version1)
    assert assets.train is not None
    assert assets.train.policy == assets.policy
    assert assets.policy.sampler == Euler(num_steps=3)
    assert assets.policy.guidance == Guidance(1.5, "prompt")
    assert assets.policy.objective == Gaussian(
        time=Beta(2.0), draws=2, regression_draw=True, regression_warmup_steps=2, dropout=ConditionDropout(prompt=0.1)
    )
    assert assets.train.optim.peak_lr == 1e-3
    assert "image_encoder" in checkpoint.restore_params(version1)


@pytest.mark.parametrize(("old", "new"), [("true", "full"), ("false", "none")])
def test_remat_of_the_first_checkpoints_was_a_truth_value(version1, old, new):
    file = checkpoint.resolve(version1) / "assets" / "config.json"
    content = file.read_text()
    assert '"remat": "none"' in content
    file.write_text(content.replace('"remat": "none"', f'"remat": {old}'))
    assert checkpoint.load_assets(version1).policy.model.remat == new


def test_a_policy_beside_weights_of_other_programs_is_read_in_both_versions(version1):
    content = json.loads((checkpoint.resolve(version1) / "assets" / "config.json").read_text())["policy"]
    policy = checkpoint.policy_from_json(content)
    assert policy == dataclasses.replace(checkpoint.load_assets(version1).policy, objective=Gaussian())
    assert checkpoint.policy_from_json(checkpoint.policy_to_json(policy)) == policy
    with pytest.raises(CheckpointError, match="format version 9"):
        checkpoint.policy_from_json(content | {"format_version": 9})
