"""Datasets at another rate than the one they were recorded at, so that a policy learns actions of one rate alone.

Frame k of an episode is what was there k / rate seconds after its beginning. Positions are interpolated, poses with
their rotations; changes are those of the whole time until the next frame, so that their sum stays; velocities are its
mean; grippers, pictures and everything else are those of the nearest recorded frame, the earlier one of two. An episode
lasts as long as before: what goes beyond its last frame repeats it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from pi0_jax.data.poses import Pose, between, from_model, model_slice, to_model
from pi0_jax.data.robots import Robot
from pi0_jax.data.source import ACTION, STATE, VALID, Number, Rows, Source, Wrapped
from pi0_jax.errors import UserError

SAME_RATE = 1.01
"""Ratio of two rates up to which they are the same, such as 29.97 and 30 frames per second."""
DIGITS = 9
"""Places are rounded to so many digits, so that 3 · (50 / 15) is frame 10."""

_log = logging.getLogger(__name__)


def same_rate(a: Number | float, b: Number | float) -> bool:
    """Whether two rates are the same, within what cameras differ."""
    return bool(max(a, b) <= SAME_RATE * min(a, b))


class Resampled(Wrapped):
    """A dataset at another rate.

    Args:
        source: the dataset as it was recorded.
        fps: the rate it is to have, frames per second.
        robot: of the dataset; its `changes`, `velocities`, `poses` and grippers say what may be interpolated.
        semantics: of the actions, one of `data.robots.SEMANTICS` each.

    Raises:
        UserError: the rate is not above 0, or poses of actions are changes.
    """

    def __init__(self, source: Source, fps: int | float, robot: Robot, semantics: Sequence[str]):
        super().__init__(source)
        if not fps > 0:
            raise UserError(f"the rate that datasets are brought to is {fps}; expected frames per second, above 0.")
        self.fps = fps
        self._ratio = source.fps / fps
        lengths = np.ceil(np.round(source.lengths / self._ratio, DIGITS)).astype(np.int64)
        self.ends = np.cumsum(np.maximum(lengths, 1))
        self._kinds = {STATE: _kinds_of_state(robot, semantics), ACTION: _kinds_of_actions(robot, semantics)}
        self._robot = robot

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        return self.source.task_index[self.nearest(np.arange(self.num_frames))]

    @property
    def shard_ends(self) -> Int[np.ndarray, "s"]:
        return self.ends[np.searchsorted(self.source.ends, self.source.shard_ends)]

    def task_numbers(self, rows: Rows) -> Rows:
        return self.source.task_numbers(self.nearest(rows))

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        return self.source.images(camera, self.nearest(rows))

    def together(self, camera: str, row: Number) -> Int[np.ndarray, "n"]:
        return np.array([row])

    def episode_keys(self) -> list[int]:
        """Those of the episodes as they were recorded."""
        return self.source.episode_keys()

    def nearest(self, rows: Rows) -> Rows:
        """The recorded frame that is nearest to each frame."""
        episodes = self.episode_of(rows)
        place = rows - (self.ends - self.lengths)[episodes]
        first, last = (self.source.ends - self.source.lengths)[episodes], self.source.ends[episodes] - 1
        return np.minimum(first + _nearest(place * self._ratio), last)

    def keeps(self, rows: Int[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
        """The frames whose nearest recorded frame is among the given ones."""
        return np.flatnonzero(np.isin(self.nearest(np.arange(self.num_frames)), rows))

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> Shaped[np.ndarray, "n *shape"]:
        values, spans = self.source.read(name, episodes), self._spans(episodes)
        if name == VALID:
            return np.all([(part > 0) | (share <= 0)[:, None] for part, share in spans.parts(values)], 0).astype(
                values.dtype
            )
        near = values[spans.near]
        if name not in self._kinds or values.shape[1:] != (len(self._kinds[name]),):  # others than the robot's
            return near
        kinds = np.array(self._kinds[name])
        exact = values.astype(np.float64)
        out = np.where(kinds == "nearest", near, self._interpolated(name, exact, spans, kinds == "angle"))
        if (summed := np.isin(kinds, ("change", "velocity"))).any():
            total = sum(part[:, summed] * share[:, None] for part, share in spans.parts(exact))
            time = sum(share for _, share in spans.parts(exact))
            out[:, summed] = np.where(kinds[summed] == "velocity", total / np.reshape(time, (-1, 1)), total)
        return out.astype(values.dtype if values.dtype.kind == "f" else np.float32)

    def _interpolated(
        self, name: str, values: Float[np.ndarray, "n d"], spans: _Spans, angles: Shaped[np.ndarray, "d"]
    ) -> Float[np.ndarray, "m d"]:
        out = spans.between(values, angles)
        key = "state" if name == STATE else "actions"
        poses: tuple[Pose, ...] = getattr(self._robot.poses, key)
        if not poses:
            return out
        adapt = self._robot.adapt
        known = values if adapt is None else getattr(adapt, key)(values)
        ours = to_model(known, poses)
        before, after = ours[spans.low], ours[spans.high]
        for pose in poses:
            own = model_slice(pose, poses)
            before[:, own] = between(before[:, own], after[:, own], spans.weight)
        turned = from_model(before, poses)
        turned = turned if adapt is None else getattr(adapt, f"{key}_inverse")(turned)
        posed = [i for pose in poses for i in range(pose.start, pose.end)]
        out[:, posed] = np.where((spans.weight > 0)[:, None], turned[:, posed], values[spans.low][:, posed])
        return out

    def _spans(self, episodes: Int[np.ndarray, "k"]) -> _Spans:
        recorded, lengths = self.source.lengths[episodes], self.lengths[episodes]
        place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        first = np.repeat(np.cumsum(recorded) - recorded, lengths)
        end = first + np.repeat(recorded, lengths)
        begin = np.round(place * self._ratio, DIGITS)
        return _Spans(first, end, begin, np.round((place + 1) * self._ratio, DIGITS))


class _Spans(NamedTuple):
    """The time from each frame to the next one, counted in recorded frames; rows are those of the episodes read."""

    first: Int[np.ndarray, "m"]
    """First row of the frame's episode."""
    end: Int[np.ndarray, "m"]
    """The row after its last."""
    begin: Float[np.ndarray, "m"]
    """From the episode's beginning to the frame."""
    until: Float[np.ndarray, "m"]
    """And to the next one."""

    @property
    def near(self) -> Int[np.ndarray, "m"]:
        """The nearest row."""
        return np.minimum(self.first + _nearest(self.begin), self.end - 1)

    @property
    def low(self) -> Int[np.ndarray, "m"]:
        """The row at or before the frame."""
        return np.minimum(self.first + np.floor(self.begin).astype(np.int64), self.end - 1)

    @property
    def high(self) -> Int[np.ndarray, "m"]:
        """The row after that one."""
        return np.minimum(self.low + 1, self.end - 1)

    @property
    def weight(self) -> Float[np.ndarray, "m"]:
        """Share of the way from that row to the next one."""
        return self.begin - np.floor(self.begin)

    def between(self, values: Float[np.ndarray, "n d"], angles: Shaped[np.ndarray, "d"]) -> Float[np.ndarray, "m d"]:
        """Values on the straight line between two rows; angles go the short way, and stay near one of them."""
        before, after, weight = values[self.low], values[self.high], self.weight[:, None]
        way = after - before
        way[:, angles] = np.pi - np.mod(np.pi - way[:, angles], 2 * np.pi)
        return np.where(weight <= 0.5, before + weight * way, after - (1 - weight) * way)

    def parts(
        self, values: Float[np.ndarray, "n d"] | Shaped[np.ndarray, "n 1"]
    ) -> list[tuple[np.ndarray, Float[np.ndarray, "m"]]]:
        """Rows that a frame's time goes over, one after another, and the share of each row's time that is in it."""
        found, begin = [], np.floor(self.begin)
        for step in range(int(np.ceil((self.until - self.begin).max(initial=0))) + 1):
            start = begin + step
            share = np.minimum(self.until, start + 1) - np.maximum(self.begin, start)
            row = self.first + start.astype(np.int64)
            share = np.where(row < self.end, np.clip(share, 0, 1), 0)
            found.append((values[np.minimum(row, self.end - 1)], share))
        return found


def _nearest(place: Float[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
    return np.ceil(np.round(place, DIGITS) - 0.5).astype(np.int64)


def _kinds_of_state(robot: Robot, semantics: Sequence[str]) -> tuple[str, ...]:
    """How each dimension of the state comes to another rate."""
    kinds = ["nearest" if _is_gripper(name, robot.grippers.state) else "position" for name in robot.state]
    for i, meaning in enumerate(semantics):
        if meaning == "angle":
            kinds[i] = "angle"
    return tuple(kinds)


def _kinds_of_actions(robot: Robot, semantics: Sequence[str]) -> tuple[str, ...]:
    """The same of the actions."""
    posed = {robot.actions[i] for pose in robot.poses.actions for i in range(pose.start, pose.end)}
    if wrong := sorted(posed & set(robot.changes)):
        raise UserError(
            f"actions {wrong} of {robot.name} are changes and part of a pose, which cannot be brought to another rate. "
            "Convert the dataset, or train at its own rate (data.mixed_rates)."
        )
    kinds = []
    for name, meaning in zip(robot.actions, semantics, strict=True):
        if name in robot.changes:
            kinds.append("velocity" if name in robot.velocities else "change")
        elif meaning == "gripper" or _is_gripper(name, robot.grippers.actions):
            kinds.append("nearest")
        else:
            kinds.append("angle" if meaning == "angle" else "position")
    return tuple(kinds)


def _is_gripper(name: str, known: Mapping[str, tuple[float, float]]) -> bool:
    return name in known or "gripper" in name.lower()


def log_rate(source: Resampled, robot: Robot) -> None:
    """Says what becomes of each action."""
    words = {
        "position": "interpolated",
        "angle": "interpolated as angles",
        "change": "summed",
        "velocity": "averaged",
        "nearest": "of the nearest frame",
    }
    found = []
    for kind, word in words.items():
        if names := [n for n, own in zip(robot.actions, source._kinds[ACTION], strict=True) if own == kind]:
            found.append(f"{', '.join(names)} {word}")
    _log.info(
        "%s: from %g to %g frames per second; actions are %s",
        source.root,
        source.source.fps,
        source.fps,
        "; ".join(found),
    )
