"""What was saved comes back on any devices, or is refused with the reason."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax import checkpoint
from pi0_jax.checkpoint import Assets, CheckpointError, CheckpointWriter
from tests.checkpoint.common import ASSETS, TRAIN, Moments, abstract, assert_same, train_state, weights


def test_everything_comes_back_bit_for_bit(run):
    assert_same(checkpoint.restore_params(run), weights(30))
    state = checkpoint.restore_train_state(run, abstract(train_state()))
    assert_same(state, train_state(30))
    assert isinstance(state["opt_state"][0], Moments)
    assert checkpoint.load_data_state(run) == {"position": 30}
    assert checkpoint.load_assets(run) == ASSETS


def test_weights_can_be_cast_on_the_way_in(run):
    params = checkpoint.restore_params(run, dtype=jnp.bfloat16)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(30)))


def test_training_does_not_resume_from_weights_alone(tmp_path):
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(0, weights(1), Assets(TRAIN.policy, None, None))
    assert_same(checkpoint.restore_params(tmp_path), weights(1))
    assert checkpoint.load_assets(tmp_path) == Assets(TRAIN.policy, None, None, None)
    with pytest.raises(CheckpointError, match=r"weights only.*--init-from"):
        checkpoint.restore_train_state(tmp_path, abstract(train_state()))


def test_any_number_of_devices_reads_what_eight_saved(tmp_path):
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


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_damaged_file_is_harmless_or_named_with_a_way_out(run, copy, damage):
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
