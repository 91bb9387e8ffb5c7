"""Too little disk or memory is noticed before anything is written."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax import checkpoint
from pi0_jax.checkpoint import CheckpointWriter, space
from tests.checkpoint.common import ASSETS, weights


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


def test_too_little_memory_for_a_save_is_noticed_before_it(tmp_path, monkeypatch):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    divided, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("x"), jax.P()))
    # All devices are this process's: a divided array is copied once, and so is one of which each device has a replica.
    state: list[Any] = [jax.ShapeDtypeStruct((1000, 8), jnp.float32, sharding=place) for place in (divided, whole)]
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
