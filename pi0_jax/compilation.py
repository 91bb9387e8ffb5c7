"""Compiled programs: kept from run to run, and watched, since a run should compile none of them twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

from pi0_jax import compat
from pi0_jax.data.files import user_cache

_log = logging.getLogger(__name__)


def keep_programs(folder: str | None) -> None:
    """Makes JAX keep compiled programs in a folder, so that another run of the same programs starts sooner.

    JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE take precedence.

    Args:
        folder: to keep them in; "default" is `compiled` in the user's cache (`data.files.user_cache`). None: nowhere.
    """
    if folder is None:
        return
    if folder == "default":
        folder = str(user_cache() / "compiled")
    wanted = str(Path(folder).expanduser().absolute())
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", wanted)
        compat.reset_compilation_cache()  # JAX latches "no cache folder" at the first compilation


class CompileMonitor:
    """A context that counts compilations, and says why a program is compiled again."""

    def __init__(self):
        self.programs = self.cache_hits = 0
        """Programs compiled, and how many of them were found in the folder of `keep_programs`."""
        self.seconds = 0.0
        """Total compilation time."""
        self.again = 0
        """Calls that compiled a program which had been compiled before."""
        self._seen: dict[str, dict[str, str]] = {}

    def __enter__(self) -> CompileMonitor:
        monitoring.register_event_duration_secs_listener(self._compiled)
        monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_):
        monitoring.unregister_event_duration_listener(self._compiled)
        monitoring.unregister_event_listener(self._event)

    def _compiled(self, event: str, duration_secs: float, **_):
        if event == compat.COMPILE_EVENT:
            self.programs, self.seconds = self.programs + 1, self.seconds + duration_secs

    def _event(self, event: str, **_):
        self.cache_hits += event == compat.CACHE_HIT_EVENT

    def call(self, name: str, function: Callable, *args: Any) -> Any:
        """Calls a compiled function; a second program of the same name is a warning."""
        before = self.programs
        result = function(*args)
        if self.programs > before:
            self._note(name, _signature(args))
        return result

    def _note(self, name: str, now: dict[str, str]):
        then = self._seen.get(name)
        if then is not None:
            self.again += 1
            changes = [f"{key} was {then.get(key)} and is {now.get(key)}" for key in now if then.get(key) != now[key]]
            why = "; ".join(changes[:5]) or "its arguments have the same shapes, types and places"
            _log.warning("the %s was compiled again: %s%s", name, why, " ..." if changes[5:] else "")
        self._seen[name] = now

    def summary(self) -> str:
        """What was compiled, in words."""
        kept = f", {self.cache_hits} of them found in the cache" if self.cache_hits else ""
        again = f"; {self.again} AGAIN" if self.again else "; none twice"
        return f"compiled {self.programs} programs in {self.seconds:.1f} s{kept}{again}"


def _signature(args) -> dict[str, str]:
    """By path: type, shape and place of every array."""

    def kind(x) -> str:
        place = getattr(getattr(x, "sharding", None), "spec", "")
        return f"{getattr(x, 'dtype', type(x).__name__)}{list(getattr(x, 'shape', ()))} {place}".strip()

    return {
        jax.tree_util.keystr(path, simple=True, separator="."): kind(x) for path, x in jax.tree.leaves_with_path(args)
    }
