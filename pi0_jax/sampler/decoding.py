"""Decoding of action tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pi0_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One token after another, each given those before it."""

    constrained: bool = True
    """Write only what can be decoded to a chunk: the marker, codes that fit into what is left of it, `|` once it is
    whole, the end. False: whatever the network says, as openpi and LeRobot do."""
    like: Literal["openpi", "lerobot"] | None = None
    """Habits of a reference in unconstrained decoding of π0-FAST, for comparisons with it. openpi: each token is one
    position too far, and no row ends before all do with the same token. lerobot: the prompt sees the BOS after it, as
    it does not in training. None: tokens are where training has them, and each row ends by itself."""

    def __post_init__(self):
        if self.like is not None and self.constrained:
            raise UserError(
                f"sampler.like {self.like!r} is for unconstrained decoding, which references do: set "
                "--policy.sampler.no-constrained."
            )


@dataclasses.dataclass(frozen=True)
class Greedy(Decoder):
    """The likeliest token at each place."""


@dataclasses.dataclass(frozen=True)
class Categorical(Decoder):
    """A token drawn at random at each place."""

    stochastic: ClassVar[bool] = True
    temperature: float = 1.0
    """What logits are divided by: below 1, likely tokens are likelier."""
