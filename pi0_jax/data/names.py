"""Names of features: which one of a dataset is the robot's state, its actions, and each of its cameras.

A robot's own names come first, then those that openpi's, LeRobot's and other people's datasets use. What is recognised
is logged; a dataset's `keys` say otherwise.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pi0_jax.data.robots import Robot
from pi0_jax.data.source import ACTION, STATE, Reordered, Source, dimension_names
from pi0_jax.errors import listed

STATES = ("state", "states", "proprio", "qpos")
ACTIONS = ("action", "actions")
SHOWN = 8
"""Dimensions that are named."""

_log = logging.getLogger(__name__)


def last_word(feature: str) -> str:
    """Name of a feature without what it is filed under: `top` of `observation.images.top` or `observation/top`."""
    return feature.replace("/", ".").rsplit(".", 1)[-1]


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether the pictures of a feature are distances, by what a dataset says of its video."""
    info = feature.get("info") or feature.get("video_info") or {}
    grey = re.match(r"gray(f|\d)", str(info.get("video.pix_fmt") or info.get("pix_fmt") or ""))
    return bool(info.get("video.is_depth_map") or info.get("is_depth_map") or grey)


def recognise(features: Mapping[str, Mapping[str, Any]], robot: Robot) -> dict[str, str]:
    """The features of a dataset that are meant by the names of a robot.

    Args:
        features: of the dataset, with their dtypes.
        robot: whose dataset it is.

    Returns:
        Name that the robot uses → name in the dataset, as a dataset's `keys`, for those that are called otherwise and
        can be only one thing; pieces of a state are joined by " + ".
    """
    every = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
    columns = [name for name in features if name not in every]
    pictures = [name for name in every if not is_depth(features[name])]
    found = {}
    for name, usual in ((STATE, STATES), (ACTION, ACTIONS)):
        if name not in features and (match := _one(columns, usual)):
            found[name] = match
    if STATE not in features and STATE not in found:
        pieces = [_one(columns, [last_word(piece)]) for piece in robot.clients.state]
        if all(pieces) or (pieces := sorted(name for name in columns if name.startswith(f"{STATE}."))):
            found[STATE] = " + ".join(map(str, pieces))
    for name, camera in robot.cameras.items():
        aliases = [alias for alias, other in robot.clients.cameras.items() if other == camera]
        if name not in features and (match := _one(pictures, [last_word(name), *aliases])):
            found[name] = match
    return found


def _one(features: Collection[str], words: Collection[str]) -> str | None:
    """The feature whose last word is the first of `words` that some feature has; None if it is not the only one."""
    for word in words:
        if matches := [name for name in features if last_word(name) == word]:
            return matches[0] if len(matches) == 1 else None
    return None


def in_robots_order(source: Source, robot: Robot) -> Source:
    """The dataset with its state and actions in the order of the robot's names, where it has the same names.

    Names that are the robot's in another order are put right, and other names are left as they stand; either is logged.
    Where the dataset names the state alone, or the actions, and the robot calls both alike, the order is that of both.
    """
    orders = {}
    named = {feature: dimension_names(source.features[feature]) for feature in (STATE, ACTION)}
    for feature, other, ours in ((STATE, ACTION, robot.state), (ACTION, STATE, robot.actions)):
        borrowed = named[feature] is None and robot.state == robot.actions
        theirs = named[other] if borrowed else named[feature]
        if theirs is None or len(theirs) != len(ours) or tuple(source.features[feature]["shape"]) != (len(ours),):
            continue
        order = same_names(theirs, ours)
        if order is None and not borrowed:
            pairs = [f"{a} is read as {b}" for a, b in zip(theirs, ours, strict=True) if _plain(a) != _plain(b)]
            what = listed(pairs, SHOWN)
            _log.info("%s: %s has other names than %s, taken as they stand: %s", source.root, feature, robot.name, what)
        elif order is not None and order != sorted(order):
            orders[feature] = order
            what = ", ".join(theirs) + (f" (the names of {other}, as it has none)" if borrowed else "")
            _log.info("%s: %s is in the order %s; put into that of %s", source.root, feature, what, robot.name)
    return Reordered(source, orders) if orders else source


def same_names(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Where each of our names is among theirs, whatever LeRobot's versions put around them; None if they are others."""
    places = {_plain(name): i for i, name in enumerate(theirs)}
    if len(places) != len(theirs) or {_plain(name) for name in ours} != set(places):
        return None
    return [places[_plain(name)] for name in ours]


def _plain(name: str) -> str:
    """Name of a joint without what LeRobot's versions put around it: `main_shoulder_pan`, `shoulder_pan.pos`."""
    return name.lower().removeprefix("main_").removesuffix(".pos")


def log_recognised(root: object, found: Mapping[str, str]) -> None:
    """Says which names stand for which, once per dataset."""
    if found:
        pairs = ", ".join(f"{theirs} is read as {ours}" for ours, theirs in found.items())
        _log.info("%s: %s; its `keys` can say otherwise", root, pairs)
