"""The type checker of test runs: beartype, once per function of the source.

A function inside a function is a new one at each call of the outer one, and jaxtyping has it checked anew. What
beartype compiles for it is the same each time, and takes longer than most such functions do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

_CHECKED: dict[tuple[str, str, str, str], Callable] = {}


def check(stand_in: Any) -> Any:
    """A checked form of the empty function with the annotations of another that jaxtyping makes for it."""
    if "<locals>" not in stand_in.__qualname__:
        return beartype(stand_in)
    key = (stand_in.__module__, stand_in.__qualname__, repr(stand_in.__annotations__), repr(stand_in.__defaults__))
    if key not in _CHECKED:
        _CHECKED[key] = beartype(stand_in)
    return _CHECKED[key]
