"""Decoding of action tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One token after another, each given those before it."""

    constrained: bool = True
    """Write only what can be decoded to a chunk: the marker, codes that fit into what is left of it, `|` once it is
    whole, the end. False: whatever the network says, as openpi and LeRobot do."""


@dataclasses.dataclass(frozen=True)
class Greedy(Decoder):
    """The likeliest token at each place."""


@dataclasses.dataclass(frozen=True)
class Categorical(Decoder):
    """A token drawn at random at each place."""

    stochastic: ClassVar[bool] = True
    temperature: float = 1.0
    """What logits are divided by: below 1, likely tokens are likelier."""
