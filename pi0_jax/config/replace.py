"""Changes of a tree of frozen dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def replace(config: T, changes: dict[str, Any]) -> T:
    """A copy with fields set anew by their dotted names: `replace(config, {"policy.model.remat": "none"})`."""
    for path, value in changes.items():
        name, _, below = path.partition(".")
        if below:
            value = replace(getattr(config, name), {below: value})
        config = dataclasses.replace(config, **{name: value})  # pyright: ignore[reportArgumentType]
    return config
