"""These tests compile many small programs: cheaply, and each only once, in subprocesses too."""

import os

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def _compilation_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("xla"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (folder, 0.1), strict=True):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())
