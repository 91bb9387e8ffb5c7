"""What was measured of a policy, as plain values; `dataclasses.asdict` of them is the page's JSON file.

Errors are root mean squares of normalised actions, as in the loss, over steps inside the episodes.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, by bootstrap over episodes."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Use:
    """What becomes of the error when the policy does without something, from the same noise."""

    kind: str
    """instruction, camera or state."""
    name: str
    """Of the camera; the kind again for the others."""
    how: str
    """What was done to it, such as "black"."""
    error: float
    increase: Interval
    """Of the error, as a share of the plain one: 0.5 is half as much again."""
    change: float
    """Root-mean-square change of the chunks, as a share of the plain error."""


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dimension of the actions in the model."""

    name: str
    error: float | None
    """Root mean square, robot units; None: the robot has no such dimension, as for rotations."""
    skill: float | None
    """1 - squared error / variance of the demonstrated actions: 1 is perfect, 0 is the average action, always. None:
    the dimension does not vary."""


@dataclasses.dataclass(frozen=True)
class Roughness:
    """Root mean squares of the policy's actions over those of the demonstrations: the median over the dimensions that
    move; 1 is alike. None: too few steps, or nothing moves."""

    jitter: float | None
    """Of second differences within chunks."""
    seams: float | None
    """Of the step from the last action executed of a chunk to the first of the next one."""


@dataclasses.dataclass(frozen=True)
class Switches:
    """When a gripper opens or closes, beside the demonstrations."""

    name: str
    """Dimension of the actions."""
    motion: str
    """closes: away from where most episodes begin; opens: back."""
    count: int
    """Switches in the demonstrations."""
    found: int
    """How many of them the policy has, too, near that time."""
    own: int
    """Switches of the policy, whenever."""
    delay: Interval | None
    """Median, frames; positive is late. None: none was found."""


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How far the pictures are from those of the training frames."""

    frames: int
    """Training frames that were looked at."""
    ratio: float
    """Median distance of held-out frames to their nearest training frame, over that of training frames to their nearest
    one of another episode: 1 is as alike as training episodes are."""
    correlation: float
    """Rank correlation of that distance with the error."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """All that was measured."""

    episodes: int
    chunks: int
    every: int
    """Frames from one chunk to the next."""
    execute_steps: int
    """Of the policy's configuration."""
    fps: float
    error: float
    average_error: float
    """Of the average action, always."""
    training_error: float | None
    """On training frames; None: the training data were not there."""
    dimensions: list[Dimension]
    horizon: list[float]
    """Error of each step of the chunk, up to the last that lies inside an episode."""
    phases: list[float | None]
    """Error in the first, second and last third of the episodes."""
    roughness: Roughness
    switches: list[Switches]
    uses: list[Use]
    not_tried: dict[str, str]
    """What could not be taken from the policy, and why."""
    nearness: Nearness | None
    attention: dict[str, float] | None
    """Share of the action tokens' attention by what it goes to; None: the network has no such attention."""

    @property
    def skill(self) -> float:
        """1 - squared error / variance of the demonstrated actions."""
        return 1 - (self.error / self.average_error) ** 2 if self.average_error else 0.0
