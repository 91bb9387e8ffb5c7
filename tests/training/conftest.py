"""These tests compile many small programs: cheaply, and each only once, in subprocesses too."""

import os

import jax
import pytest

from pi0_jax import compat


@pytest.fixture(scope="package", autouse=True)
def _compilation_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("xla"))
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: (getattr(jax.config, name), os.environ.get(name.upper())) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compat.reset_compilation_cache()
    yield
    for name, (value, variable) in before.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())
        if variable is not None:
            os.environ[name.upper()] = variable
    compat.reset_compilation_cache()
