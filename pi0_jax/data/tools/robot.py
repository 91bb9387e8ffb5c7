"""The file of a robot that fits a dataset, to be looked through and completed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.files import find_dataset
from pi0_jax.data.lerobot.layout import read_info
from pi0_jax.data.mixture import open_source
from pi0_jax.data.names import is_depth, last_word, recognise, same_names
from pi0_jax.data.poses import Poses
from pi0_jax.data.rlds.reader import feature_names
from pi0_jax.data.robots import ROBOTS, Robot, get_robot
from pi0_jax.data.source import ACTION, STATE, Source, dimension_names
from pi0_jax.data.tools.pose_names import FoundPose, find_poses
from pi0_jax.errors import UserError

SCENE = ("scene", "front", "top", "high", "head", "exterior", "over", "third", "agent", "base", "ego", "image", "side")
ON_HAND = re.compile(r"wrist|gripper|tool|hand(?!_?(side|held))")
ENOUGH, TRIED = 32, 500
"""Episodes that are read, and looked for."""
FOLLOWS, TOGETHER = 0.3, 0.8
"""An action is a position if its median difference to the state is below this share of the state's deviation, and their
correlation above."""
HARDLY = 1e-6
"""Deviation of a dimension that does not move."""


class Proposal(NamedTuple):
    """A value, and why."""

    value: str
    reason: str


def describe_robot(path: str, name: str, offline: bool = False, keys: Mapping[str, str] = {}) -> str:
    """Python source that sets `ROBOT` for a LeRobot or RLDS dataset.

    Args:
        path: folder of the dataset, or hf://owner/name.
        name: of the robot, where the dataset says none.
        offline: as of `find_dataset`.
        keys: as of `DatasetConfig`.

    Raises:
        FileNotFoundError, UserError: no dataset, or one without states or actions that can be recognised.
    """
    root = find_dataset(path, offline, videos=False)
    info = read_info(root) if (root / "meta/info.json").is_file() else {}
    unknown = Robot(name, {}, (), (), info.get("fps", 1), (224, 224))
    source = open_source(DatasetConfig(str(root), keys=dict(keys)), DataConfig(frames="random"), unknown)
    state, actions = read_some(source)
    named, named_actions = (dimension_names(source.features[name]) for name in (STATE, ACTION))
    state_names = named or _numbered("state", state.shape[1])
    alike = named is not None and named_actions is None and state.shape[1] == actions.shape[1]
    action_names = state_names if alike else named_actions or _numbered("action", actions.shape[1])
    poses, found = propose_poses(state, actions, state_names, action_names)
    semantics = propose_semantics(state, actions, state_names, action_names, poses)
    depth = [camera for camera in source.cameras if is_depth(source.features[camera])]
    cameras = propose_cameras([camera for camera in source.cameras if camera not in depth])
    shape = source.features[next(iter(cameras))]["shape"] if cameras else (224, 224, 3)
    size = tuple(shape[:2]) if None not in shape else (224, 224)
    kind = info.get("robot_type")
    lines = [
        f'"""{Path(path).name}: say here what robot it is, and in which units."""',
        "",
        f"from pi0_jax.data.robots import {'Pose, Poses, ' * bool(poses.state)}Robot",
        "",
        "ROBOT = Robot(",
        f"    name={json.dumps(name if kind in (None, '', 'unknown') else kind)},",
        "    # Feature of the dataset -> camera of the model. Released weights know base_0_rgb, left_wrist_0_rgb and",
        "    # right_wrist_0_rgb, and were trained with the scene in the first and cameras on a hand in the others.",
        "    cameras={",
        *(f"        {json.dumps(camera)}: {json.dumps(p.value)},{p.reason}" for camera, p in cameras.items()),
        *(f"        # {json.dumps(camera)} is left out: it is depth." for camera in depth),
        "    },",
        *_vector("state", state_names),
        *["    # The dataset does not name its actions: these are the state's names, a guess."] * alike,
        *_vector("actions", action_names),
        *_pose_lines(found),
        f"    fps={info.get('fps')!r}," + "  # to be filled in: the dataset does not say" * ("fps" not in info),
        f"    image_size={size!r},",
        '    # One per action: "absolute", "gripper" (absolute too), "relative" to the state of the same index (joint',
        '    # targets are best learnt so), or "angle" (relative, radians that wrap). Proposed from the data:',
        "    semantics=(",
        *(f"        {json.dumps(p.value)},  # {n}: {p.reason}" for n, p in zip(action_names, semantics, strict=True)),
        "    ),",
        *_change_lines([n for n, p in zip(action_names, semantics, strict=True) if p.value == "absolute"]),
        ")",
        "",
    ]
    if fitting := " or ".join(built_in_robots(source, root)):
        lines[-1:] = [f"# pi0_jax has a robot with these names, which says more: --policy.robot {fitting}", ""]
    return "\n".join(lines)


def built_in_robots(source: Source, root: Path) -> list[str]:
    """Names of the robots in `pi0_jax.data.robots` whose published RLDS dataset this may be, or which have its cameras
    and call state and actions as it does."""
    robots = [get_robot(name) for name in ROBOTS]
    if not (root / "meta/info.json").is_file():
        names = set(feature_names(root))
        return [robot.name for robot in robots if robot.rlds is not None and robot.rlds.features <= names]

    def fits(robot: Robot) -> bool:
        cameras = set(robot.cameras) <= {*source.cameras, *recognise(source.features, robot)}
        both = ((STATE, robot.state), (ACTION, robot.actions))
        theirs = [(dimension_names(source.features[name]) or (), ours) for name, ours in both]
        return cameras and all(same_names(*each) is not None for each in theirs)

    return [robot.name for robot in robots if fits(robot)]


def _numbered(what: str, width: int) -> tuple[str, ...]:
    return tuple(f"{what}_{i}" for i in range(width))


def _vector(field: str, names: Sequence[str]) -> list[str]:
    line = f"    {field}=({', '.join(map(json.dumps, names))},),"
    return [line] if len(line) <= 110 else [f"    {field}=(", *(f"        {json.dumps(n)}," for n in names), "    ),"]


def _pose_lines(found: Mapping[str, Sequence[FoundPose]]) -> list[str]:
    if not any(found.values()):
        return []
    lines = [
        "    # Poses by the index of x, and how their rotation is given (pi0_jax/data/poses.py). The model reads six",
        "    # numbers of a rotation; relative poses are in the frame of the one at which a chunk begins.",
        "    poses=Poses(",
    ]
    for key, poses in found.items():
        inside = [f"            Pose({pose.start}, {json.dumps(pose.rotation)}),  # {why}" for pose, why in poses]
        lines += [f"        {key}=(", *inside, "        ),"] if poses else []
    return [*lines, "    ),"]


def _change_lines(names: Sequence[str]) -> list[str]:
    """A guess at `changes`, as a comment."""
    if not names:
        return []
    return [
        "    # If these are changes or velocities, so that the robot holds still at 0 of them, say so:",
        *(f"    # {line.strip()}" for line in _vector("changes", names)),
    ]


def propose_cameras(cameras: Sequence[str]) -> dict[str, Proposal]:
    """The model's name for each camera of a dataset. Only a camera on a hand gets the slot of a wrist."""
    words = _short_names(cameras)
    on_hand = [camera for camera in cameras if ON_HAND.search(camera.lower())]
    scene = [camera for camera in cameras if camera not in on_hand]
    known = [camera for camera in scene if any(word in words[camera] for word in SCENE)]
    found: dict[str, Proposal] = {}
    for camera in on_hand:
        slot = "right_wrist_0_rgb" if "right" in words[camera] else "left_wrist_0_rgb"
        if slot in [p.value for p in found.values()]:
            slot = _own(words[camera])
        found[camera] = Proposal(slot, "")
    for camera in scene:
        if camera == (known or scene)[0]:
            guess = "" if known and len(scene) == 1 else "  # a guess: the camera that sees the whole scene"
            found[camera] = Proposal("base_0_rgb", guess)
        else:
            reason = "  # no slot of the released weights: name it in model.cameras to use it"
            found[camera] = Proposal(_own(words[camera]), reason)
    return {camera: found[camera] for camera in cameras}


def _short_names(cameras: Sequence[str]) -> dict[str, str]:
    """The last word of each camera; or, where some have the same, such as `head.rgb` and `wrist.rgb`, what differs."""
    words = {camera: last_word(camera).lower() for camera in cameras}
    if len(set(words.values())) == len(words):
        return words
    parts = {camera: camera.lower().replace("/", ".").split(".") for camera in cameras}
    shared = set.intersection(*map(set, parts.values()))
    names = {camera: "_".join(word for word in parts[camera] if word not in shared) for camera in cameras}
    distinct = len(set(names.values())) == len(names) and all(names.values())
    return names if distinct else {camera: "_".join(words) for camera, words in parts.items()}


def _own(word: str) -> str:
    return word if word.endswith("_rgb") else f"{word}_rgb"


def read_some(source: Source) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n a"]]:
    """States and actions of some episodes that can be read, such as those that a partial download has.

    Raises:
        UserError, FileNotFoundError: none of the first `TRIED` can.
    """
    found, tried = [], min(source.num_episodes, TRIED)
    for episode in range(tried):
        try:
            found.append([source.read(name, np.array([episode])) for name in (STATE, ACTION)])
        except (UserError, FileNotFoundError):
            if episode == tried - 1 and not found:
                raise
        if len(found) == ENOUGH:
            break
    state, actions = (np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True))
    return state, actions


def propose_poses(
    state: Float[np.ndarray, "n d"],
    actions: Float[np.ndarray, "n a"],
    state_names: Sequence[str],
    action_names: Sequence[str],
) -> tuple[Poses, dict[str, list[FoundPose]]]:
    """Poses of the state, and those of the actions if they follow them: changes of a pose are none.

    Returns:
        The poses; and the same by key, with reasons.
    """
    found = {"state": find_poses(state_names, state), "actions": find_poses(action_names, actions)}
    poses = Poses(*(tuple(each.pose for each in found[key]) for key in ("state", "actions")))
    proposed = propose_semantics(state, actions, state_names, action_names, poses)
    if len(poses.actions) > len(poses.state) or any(proposed[p.start].value != "relative" for p in poses.actions):
        found["actions"], poses = [], poses._replace(actions=())
    return poses, found


def propose_semantics(
    state: Float[np.ndarray, "n d"],
    actions: Float[np.ndarray, "n a"],
    state_names: Sequence[str],
    action_names: Sequence[str],
    poses: Poses = Poses(),
) -> list[Proposal]:
    """What each action means: grippers by name, a pose by its position, and the others alike, positions if most of
    them follow the state.

    Returns:
        One per action: "gripper", "relative" for positions, or "absolute" for changes and the like; and why.
    """
    kinds, evidence = [""] * len(action_names), [""] * len(action_names)
    for pose, origin in zip(poses.actions, poses.state, strict=False):
        places = [(origin.start + i, pose.start + i) for i in range(3)]
        own = [_follows(state[:, i], actions[:, j], state_names[i]) for i, j in places]
        judged = [follows for follows, _ in own if follows is not None]
        kind = "relative" if 2 * sum(judged) > len(judged) else "absolute"
        for i in range(pose.start, pose.end):
            kinds[i] = kind
            evidence[i] = own[i - pose.start][1] if i < pose.start + 3 else "as its position"
    posed = {i for pose in poses.state for i in range(pose.start, pose.end)}
    follows = []
    for i, name in enumerate(action_names):
        if kinds[i]:
            continue
        if "gripper" in name.lower():
            kinds[i], evidence[i] = "gripper", "by its name"
        elif i >= len(state_names):
            evidence[i] = f"there are only {len(state_names)} states"
        elif i in posed:
            kinds[i], evidence[i] = "absolute", f"{state_names[i]} is part of a pose"
        else:
            judged, evidence[i] = _follows(state[:, i], actions[:, i], state_names[i])
            follows += [] if judged is None else [judged]
    positions = 2 * sum(follows) > len(follows) and len(action_names) <= len(state_names)
    kinds = [kind or ("relative" if positions else "absolute") for kind in kinds]
    return [Proposal(kind, reason) for kind, reason in zip(kinds, evidence, strict=True)]


def _follows(state: Float[np.ndarray, "n"], action: Float[np.ndarray, "n"], name: str) -> tuple[bool | None, str]:
    """Whether an action follows a state (None: nothing moves), and the evidence."""
    if min(spread := float(np.std(state)), float(np.std(action))) < HARDLY:
        return None, "hardly moves here"
    share = float(np.median(np.abs(action - state))) / spread
    together = float(np.corrcoef(state, action)[0, 1])
    evidence = f"{100 * share:.0f} % of a deviation from {name}, correlation {together:.2f}"
    return share < FOLLOWS and together > TOGETHER, evidence
