"""Decoding of action tokens."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The likeliest token at each place."""
