"""What is compiled is kept and counted, what is compiled twice is explained, and updates can be traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pi0_jax import compat
from pi0_jax.compilation import CompileMonitor, keep_programs
from pi0_jax.training.profiling import Profile, parse_span


def test_a_program_that_is_compiled_again_is_a_warning_that_says_what_changed(caplog):
    double = jax.jit(lambda x: {"y": 2 * x["a"]})
    with CompileMonitor() as watch:
        for size in (3, 3, 4):
            watch.call("update", double, {"a": jnp.ones(size)})
        assert watch.again == 1
        assert "update was compiled again: 0.a was float32[3]" in caplog.text
        assert "and is float32[4]" in caplog.text
        assert "1 AGAIN" in watch.summary()
        watch.call("validation", jax.jit(lambda x: x + 1), jnp.ones(3))
    assert watch.again == 1
    counted = watch.programs
    jax.jit(lambda x: x - 5)(jnp.ones(7))
    assert watch.programs == counted


@pytest.fixture
def cache_settings():
    names = (
        "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compat.reset_compilation_cache()


def test_programs_are_kept_for_the_next_run_unless_jax_was_told_otherwise(tmp_path, monkeypatch, cache_settings):
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("PI0_CACHE", str(tmp_path))
    keep_programs(None)
    assert jax.config.jax_compilation_cache_dir is None
    keep_programs("default")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    found = []
    for _ in range(2):
        with CompileMonitor() as watch:
            jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((5, 5)))
        found.append(watch.cache_hits)
    assert found[1] > found[0]
    assert list((tmp_path / "compiled").iterdir())
    keep_programs(str(tmp_path / "other"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")


@pytest.mark.parametrize("span", ["5", "5:5", "0:3", "a:b", "7:3"])
def test_an_invalid_span_is_refused(span):
    with pytest.raises(ValueError, match="expected START:STOP"):
        parse_span(span)


def test_a_trace_of_the_updates_asked_for_is_written(tmp_path):
    x = jnp.ones(4)
    with Profile(parse_span("2:4"), tmp_path / "profile") as profile:
        for update in range(1, 6):
            profile.before(update, x)
            assert (update in (2, 3)) == profile._running
            x = x + 1
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
