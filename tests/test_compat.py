"""Each interface that another package does not promise still does what `compat.py` relies on."""

from __future__ import annotations

import errno

import jax
import jax.numpy as jnp
import pytest
import tensorstore
from jax import monitoring
from orbax.checkpoint.path import step

from pi0_jax import compat


def test_jax_counts_the_programs_of_a_jitted_function():
    double = jax.jit(lambda x: 2 * x)
    for size in (3, 3, 4):
        double(jnp.ones(size))
    assert compat.count_programs(double) == 2


def test_jax_reports_compilations_and_cache_hits_under_known_names(tmp_path):
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    events: list[str] = []

    def note(event, *_, **__):
        events.append(event)

    monitoring.register_event_listener(note)
    monitoring.register_event_duration_secs_listener(note)
    try:
        jax.jit(lambda x: jnp.sin(x) + 17)(jnp.ones(11))  # latches the setting of the cache
        for name, value in settings.items():
            jax.config.update(name, value)
        compat.reset_compilation_cache()
        for _ in range(2):
            jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + 18)(jnp.ones((11, 11)))
    finally:
        monitoring.unregister_event_listener(note)
        monitoring.unregister_event_duration_listener(note)
        for name, value in before.items():
            jax.config.update(name, value)
        compat.reset_compilation_cache()
    assert compat.COMPILE_EVENT in events
    assert compat.CACHE_HIT_EVENT in events


def test_libtpu_describes_a_topology_that_is_not_there():
    pytest.importorskip("libtpu", reason="plans for TPUs need the extra tpu")
    from pi0_jax.plan.devices import find_devices

    assert len(find_devices("v5e:2x2")[1]) == 4


def test_xla_describes_gpus_that_are_not_there():
    from pi0_jax.plan.devices import find_devices, has_gpu_compiler

    if not has_gpu_compiler():
        pytest.skip("XLA's compiler for NVIDIA GPUs is not installed: extra cuda12, no GPU needed")
    found = find_devices("h100:16")[1]
    assert len(found) == 16
    assert compat.is_compile_only(found[0])
    assert not compat.is_compile_only(jax.devices("cpu")[0])


def test_xla_says_how_much_memory_a_refused_program_takes():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity"
    assert compat.bytes_of_refused_program(ValueError(text)) == 17.5 * 2**30
    assert compat.bytes_of_refused_program(ValueError("another reason")) is None


def test_orbax_marks_the_folder_of_an_unfinished_save():
    assert step.TMP_DIR_SUFFIX == compat.ORBAX_UNFINISHED


def test_tensorstore_names_the_number_of_a_system_error(tmp_path):
    (tmp_path / "file").touch()
    spec = {"driver": "zarr", "kvstore": f"file://{tmp_path / 'file' / 'array'}"}
    with pytest.raises(ValueError, match="array") as caught:
        tensorstore.open(spec, create=True, dtype="float32", shape=[3]).result()
    assert compat.tensorstore_errno(caught.value) == errno.ENOTDIR
    assert compat.tensorstore_errno(OSError(errno.EIO, "no message of TensorStore")) is None
