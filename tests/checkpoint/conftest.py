"""A run of three checkpoints, a copy of it, and a run of version 1."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from pi0_jax.checkpoint import CheckpointWriter
from tests.checkpoint.common import ASSETS, train_state, weights


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


@pytest.fixture
def version1(tmp_path):
    """A run that the first version of the format saved."""
    with tarfile.open(Path(__file__).parents[1] / "goldens" / "version1_run.tar.gz") as archive:
        archive.extractall(tmp_path / "version1", filter="data")
    return tmp_path / "version1"
