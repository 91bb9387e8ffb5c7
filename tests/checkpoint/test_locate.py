"""A path is named for what it is."""

from __future__ import annotations

import pytest

from pi0_jax import checkpoint
from pi0_jax.checkpoint import CheckpointError, CheckpointWriter
from tests.checkpoint.common import ASSETS, weights


def test_a_folder_that_is_set_aside_is_no_checkpoint_any_more(copy):
    folder = copy / "checkpoints"
    for name in ("30.damaged", "30.damaged1"):
        assert checkpoint.set_aside(folder / "30") == folder / name
        assert checkpoint.steps(copy) == [20]
        with CheckpointWriter(copy, keep=2) as writer:
            writer.save(30, weights(30), ASSETS)
        assert checkpoint.steps(copy) == [20, 30]
        assert (folder / name).is_dir()


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
