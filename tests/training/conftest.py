"""These tests compile many small programs: cheaply, and each only once, in subprocesses too."""

import os

import jax
import pytest

# Read when the first device is asked for. Compiling an update takes a third of the time without the fusion emitters;
# later versions have no such flag, and XLA ends the process over one that it does not know.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"


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
