"""Every changed or missing file of a checkpoint is found."""

from __future__ import annotations

import json
import shutil

import pytest

from pi0_jax import checkpoint
from pi0_jax.checkpoint import CheckpointError


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
