"""What is in HDF5 files of robomimic, LIBERO and ALOHA (ACT).

robomimic and LIBERO have many episodes per file:

    data                        attributes `env_args` and `problem_info`, which are JSON
    data/demo_0/actions         [n, a]
    data/demo_0/obs/NAME        [n, d] numbers, [n, h, w, 3] pictures

ALOHA has one per file:

    action                      [n, a]
    observations/NAME           [n, d]: qpos, qvel, effort
    observations/images/NAME    [n, h, w, 3], or JPEG: [n, bytes], padded with zeros to one length
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from pi0_jax.data.robots import get_robot
from pi0_jax.data.source import ACTION, STATE
from pi0_jax.errors import UserError

ALOHA_FPS = 50
"""Frames per second of ACT's recordings, which do not say it."""
ALOHA_WIDTH = 14
ACTIONS = (("actions",), ("action",))
STATES = (
    ("qpos",),
    ("ee_pos", "ee_ori", "gripper_states"),  # LIBERO, as openpi and LeRobot join them
    *(
        tuple(f"robot{arm}_{piece}" for arm in range(arms) for piece in ("eef_pos", "eef_quat", "gripper_qpos"))
        for arms in (2, 1)
    ),
    ("state",),
    ("states",),
    ("proprio",),
)
"""Observations that a state is joined of: the first of which all are there."""
LIBERO_CAMERAS = {"agentview_rgb": "image", "eye_in_hand_rgb": "image2"}
"""Names in LIBERO's files → in LeRobot's LIBERO datasets."""
TEXTS = ("language_instruction", "instruction", "prompt", "lang", "language_raw")
"""Attributes and datasets that may hold the instruction."""


@dataclasses.dataclass(frozen=True)
class Hdf5Options:
    """What HDF5 files do not say, or say otherwise."""

    fps: int | None = None
    """HDF5: frames per second, where the files do not say it."""
    prompt: str | None = None
    """HDF5: instruction of episodes that have none."""
    state: str | None = None
    """HDF5: the observations that are the state; " + " joins several, as in "joint_states + gripper_states"."""
    actions: str | None = None
    """HDF5: what of an episode the actions are, such as "actions_abs"."""
    robot_type: str | None = None
    """HDF5: name of the robot; by default what the files say."""
    rotate_180: bool = False
    """HDF5: turn the pictures by 180°. LIBERO's files have them upside down."""
    bgr: bool = False
    """HDF5: the pictures have blue first."""


class Layout(NamedTuple):
    """Where the features of an episode are."""

    features: dict[str, dict[str, Any]]
    paths: dict[str, tuple[str, ...]]
    """Feature → datasets in the episode that it is joined of."""
    left_out: tuple[str, ...]
    """Observations that are neither vectors nor pictures, and what they are."""


class Episode(NamedTuple):
    """One episode of a file."""

    file: Path
    group: str
    """"/" where the file is one episode."""
    length: int
    prompt: str
    """"" where the file has none."""
    fps: int | float | None
    robot_type: str
    is_libero: bool
    layout: Layout

    def named(self, root: Path) -> str:
        """Its name in the dataset at `root`."""
        name = str(self.file.relative_to(root)) if root.is_dir() else self.file.name
        return name if self.group == "/" else f"{name} {self.group.rsplit('/', 1)[-1]}"


def natural(name: str) -> list[tuple[int, str]]:
    """Key for sorting by the numbers in names."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def find_groups(file: Any) -> list[str]:
    """Groups of an HDF5 file that are episodes.

    Raises:
        UserError: the file is of another layout.
    """
    if "data" in file and (demos := [name for name, each in _children(file["data"]) if _is_group(each)]):
        return [f"data/{name}" for name in sorted(demos, key=natural)]
    if "observations" in file and any(name in file for (name,) in ACTIONS):
        return ["/"]
    raise UserError(
        "has neither data/demo_0, as robomimic and LIBERO have it, nor action and observations, as ALOHA has them, but "
        f"{sorted(file)[:10]}. Other layouts are written with LeRobotWriter: docs/data.md, Other formats"
    )


def describe(path: Path, file: Any, group: Any, options: Hdf5Options) -> Episode:
    """One episode of an open file.

    Raises:
        UserError: it cannot be converted; the message goes on after its name.
    """
    observations = next((name for name in ("obs", "observations") if name in group), None)
    if observations is None:
        raise UserError("has no observations; robomimic's dataset_states_to_obs.py makes them of simulator states")
    attributes = dict(file["data"].attrs) if "data" in file else {}
    is_libero = "problem_info" in attributes
    layout, length = _lay_out(group, observations, options, LIBERO_CAMERAS if is_libero else {})
    is_aloha = group.name == "/" and ("sim" in file.attrs or layout.features[STATE]["shape"] == (ALOHA_WIDTH,))
    environment = _json(attributes.get("env_args")).get("env_kwargs") or {}
    fps = environment.get("control_freq", file.attrs.get("fps", ALOHA_FPS if is_aloha else None))
    robots = "libero" if is_libero else environment.get("robots") or ("aloha" if is_aloha else "unknown")
    if is_libero or is_aloha:
        robot = get_robot("libero" if is_libero else "aloha")
        for feature, names in ((STATE, robot.state), (ACTION, robot.actions)):
            if layout.features[feature]["shape"] == (len(names),):
                layout.features[feature]["names"] = list(names)
    return Episode(
        path,
        group.name.strip("/") or "/",
        length,
        _prompt(file, group),
        None if fps is None else int(fps) if int(fps) == fps else float(fps),
        (robots if isinstance(robots, str) else "_".join(robots)).lower(),
        is_libero,
        layout,
    )


def _lay_out(group: Any, observations: str, options: Hdf5Options, cameras: Mapping[str, str]) -> tuple[Layout, int]:
    """The features of an episode and its length."""
    stored = dict(_datasets(group[observations]))
    own = {name: each for name, each in _children(group) if not _is_group(each)}
    actions = _chosen(options.actions, ACTIONS, own, "--actions")
    state = _chosen(options.state, STATES, stored, "--state")
    length = len(own[actions[0]])
    features, paths, left_out = {}, {}, []
    for name, dataset in stored.items():
        last = name.removeprefix("images/").replace("/", ".")
        if (shape := _picture_shape(dataset)) is not None:
            _check_length(dataset, length)
            feature = f"observation.images.{cameras.get(last, last)}"
            features[feature] = {"dtype": "image", "shape": shape, "names": None}
        elif (name,) == state:
            continue
        elif _is_vector(dataset) and len(dataset) == length and (feature := f"observation.{last}") != STATE:
            features[feature] = _vector([dataset])
        else:
            left_out.append(f"{name} ({dataset.dtype}{list(dataset.shape)})")
            continue
        paths[feature] = (f"{observations}/{name}",)
    joined = {STATE: (state, stored, f"{observations}/"), ACTION: (actions, own, "")}
    if "base_action" in own:  # of a mobile ALOHA
        joined["base_action"] = (("base_action",), own, "")
    for feature, (names, datasets, prefix) in joined.items():
        for name in names:
            _check_length(datasets[name], length)
        features[feature] = _vector([datasets[name] for name in names])
        paths[feature] = tuple(prefix + name for name in names)
    return Layout(features, paths, tuple(left_out)), length


def _children(group: Any) -> list[tuple[str, Any]]:
    return list(group.items())


def _is_group(each: Any) -> bool:
    return hasattr(each, "keys")


def _datasets(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Datasets of a group and of the groups in it, by their paths."""
    for name, each in _children(group):
        if _is_group(each):
            yield from _datasets(each, f"{prefix}{name}/")
        else:
            yield prefix + name, each


def _chosen(
    option: str | None, usual: Sequence[tuple[str, ...]], stored: Mapping[str, Any], flag: str
) -> tuple[str, ...]:
    """Names of the datasets that the user or else a convention means."""
    if option is not None:
        names = tuple(name.strip() for name in option.split("+"))
        if missing := [name for name in names if name not in stored]:
            raise UserError(f"has no {missing}, which {flag} names; it has {sorted(stored)}")
        return names
    for names in usual:
        if all(name in stored for name in names):
            return names
    vectors = [name for name, dataset in stored.items() if _is_vector(dataset)]
    raise UserError(f"has {vectors}; say which of them to take, such as {flag} {' + '.join(vectors[:2])!r}")


def _check_length(dataset: Any, length: int) -> None:
    if dataset.shape[:1] != (length,) or not length:
        raise UserError(f"{dataset.name} has shape {list(dataset.shape)}; the episode has {length} actions")


def _is_vector(dataset: Any) -> bool:
    return dataset.dtype.kind in "fiub" and len(dataset.shape) in (1, 2)


def _vector(datasets: Sequence[Any]) -> dict[str, Any]:
    """The feature that datasets are side by side; real numbers become float32."""
    if bad := [dataset for dataset in datasets if not _is_vector(dataset)]:
        raise UserError(f"{bad[0].name} is {bad[0].dtype}{list(bad[0].shape)}; expected one vector per frame")
    widths = {
        dataset.name.rsplit("/", 1)[-1]: 1 if len(dataset.shape) == 1 else dataset.shape[1] for dataset in datasets
    }
    types = {dataset.dtype.name for dataset in datasets}
    (dtype,) = types if len(types) == 1 and datasets[0].dtype.kind != "f" else {"float32"}
    names = [f"{name}_{i}" for name, width in widths.items() for i in _dimensions(name, width)]
    return {"dtype": dtype, "shape": (len(names),), "names": names}


def _dimensions(name: str, width: int) -> Sequence[str | int]:
    """What the dimensions of an observation are called: robosuite's positions and quaternions by letters."""
    if name.endswith(("eef_pos", "ee_pos")) and width == 3:
        return "xyz"
    return "xyzw" if name.endswith("eef_quat") and width == 4 else range(width)


def _picture_shape(dataset: Any) -> tuple[int, int, int] | None:
    """Height, width and 3 where it holds pictures, as pixels or encoded."""
    shape, dtype = dataset.shape, dataset.dtype
    if len(shape) == 4 and dtype == np.uint8 and shape[3] == 3:
        return shape[1], shape[2], 3
    may_be = (len(shape) == 1 and dtype.kind in "OS") or (len(shape) == 2 and dtype == np.uint8)
    if not may_be or not shape[0] or not (first := encoded(dataset[0])).startswith((b"\xff\xd8\xff", b"\x89PNG")):
        return None
    try:
        with PIL.Image.open(io.BytesIO(first)) as image:
            return image.height, image.width, 3
    except OSError as error:
        raise UserError(f"the first picture of {dataset.name} cannot be decoded ({error})") from error


def encoded(stored: Any) -> bytes:
    """A picture as it was encoded. What pads it comes after the end that JPEG and PNG mark, and is ignored."""
    if isinstance(stored, str | bytes):
        return stored if isinstance(stored, bytes) else b""
    return np.asarray(stored).astype(np.uint8).tobytes()


def _json(text: Any) -> dict[str, Any]:
    try:
        content = json.loads(text or "{}")
    except (TypeError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _prompt(file: Any, group: Any) -> str:
    """The instruction of an episode or else of its file; "" for none."""
    for place in (group, file.get("data", file), file):
        attributes = place.attrs
        texts = [
            _json(attributes.get("ep_meta")).get("lang"),
            _json(attributes.get("problem_info")).get("language_instruction"),
            *(attributes.get(name) for name in TEXTS),
            *(place[name][()] for name in TEXTS if getattr(place.get(name), "shape", None) in ((), (1,))),
        ]
        for text in texts:
            if plain := _plain(text):
                return plain
    return ""


def _plain(text: Any) -> str:
    if isinstance(text, np.ndarray) and text.size == 1:
        text = text.ravel()[0]
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    if isinstance(text, list):  # the letters of some of LIBERO's
        text = "".join(map(str, text))
    return text.strip().strip('"').strip() if isinstance(text, str) else ""
