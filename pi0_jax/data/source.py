"""What every kind of dataset looks like to the rest of the software: episodes of frames, by column and by camera.

Frames are numbered through the dataset, episode after episode. Columns of numbers are small and are read whole;
pictures are read for the frames that are asked for.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from pi0_jax.data.pool import behind
from pi0_jax.errors import UserError, did_you_mean, listed

STATE, ACTION, VALID = "observation.state", "action", "valid"
"""Names of the columns we read. `valid`, shape (1,), is optional: 0 where something other than the demonstrator chose
the action, so that it must not be learnt."""
SUCCESS = "next.success"
"""Name of the column, shape (1,), that is not 0 in some frame of an episode that succeeded (LeRobot's name)."""

FEW_FRAMES = 2**18
"""Frames up to which columns are read whole before training; of more, what the first batches need is read first."""

_log = logging.getLogger(__name__)

Rows = Int[np.ndarray, "*b"]
Number = int | np.integer


class Instruction(str):
    """An instruction, with the text that a policy is to write after it and before it acts."""

    text: str = ""

    def __new__(cls, instruction: str, text: str) -> Instruction:
        self = super().__new__(cls, instruction)
        self.text = text
        return self

    def __getnewargs__(self) -> tuple[str, str]:
        return str(self), self.text


def text_of(instruction: str) -> str:
    """What is to be written after an instruction; "" is nothing."""
    return getattr(instruction, "text", "")


class BadEpisode(UserError):
    """An episode that cannot be read. The message names the file and the episode, and is for the user, from whichever
    process it comes."""


def dimension_names(feature: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of a vector's dimensions, however a dataset nests them; None where it has none, or not one for each."""
    names = _flat(feature.get("names"))
    fit = len(set(names)) == len(names) and tuple(feature["shape"][:1]) == (len(names),)
    return tuple(names) if fit else None


def _flat(names: Any) -> list[str]:
    if isinstance(names, Mapping):
        if names and all(isinstance(value, int) for value in names.values()):  # name to index
            return sorted(names, key=lambda name: names[name])
        return _flat(list(names.values()))
    if isinstance(names, list | tuple):
        return [name for each in names for name in _flat(each)]
    return [] if names is None else [str(names)]


class Source(abc.ABC):
    """Episodes of demonstrations, which several threads may read at once. Instances can be pickled: what is open or
    kept in memory is opened and read again elsewhere."""

    has_actions: bool = True
    """False for image-text pairs, whose states and actions are zeros that mean nothing."""
    root: Path
    """Folder of the dataset."""
    fps: int | float
    """Frames per second."""
    features: dict[str, dict[str, Any]]
    """For each feature its dtype ("video" and "image" are pictures), shape and names."""
    tasks: list[str]
    """Instructions by task index."""
    episodes: list[str]
    """Name of each episode, for messages."""
    recordings: list[str] | None = None
    """Name of each episode's recording as files of ranges call it (`data.ranges`); None: not known."""
    ends: Int[np.ndarray, "e"]
    """For each episode the frame after its last."""
    skipped: dict[str, str]
    """Episodes that were left out because they cannot be read: their name, and why."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_columns", "_local")}

    def opened(self) -> dict[Any, Any]:
        """Decoders and readers that this thread has open: they must not be shared between threads."""
        return vars(self).setdefault("_local", threading.local()).__dict__

    def open_file(self, path: Path, open_it: Callable[[Path], Any], limit: int) -> Any:
        """The reader of a file that `open_it` gives; each thread keeps those of the `limit` files it opened last."""
        kept = self.opened().setdefault("files", {})
        if path not in kept:
            if len(kept) >= limit:
                kept.pop(next(iter(kept))).close()
            kept[path] = open_it(path)
        return kept[path]

    @property
    def cameras(self) -> tuple[str, ...]:
        """Features that are pictures."""
        return tuple(name for name, feature in self.features.items() if feature["dtype"] in ("video", "image"))

    @property
    def num_episodes(self) -> int:
        return len(self.ends)

    @property
    def num_frames(self) -> int:
        return int(self.ends[-1])

    @property
    def lengths(self) -> Int[np.ndarray, "e"]:
        """Frames of each episode."""
        return np.diff(self.ends, prepend=0)

    def episode_range(self, episode: Number) -> tuple[int, int]:
        """First frame of an episode, and the one after its last."""
        return int(self.ends[episode - 1]) if episode else 0, int(self.ends[episode])

    def frames_of(self, episodes: Int[np.ndarray, "k"]) -> Int[np.ndarray, "n"]:
        """Frames of some episodes, one episode after the other."""
        lengths = self.lengths[episodes]
        return np.arange(lengths.sum()) + np.repeat(self.ends[episodes] - np.cumsum(lengths), lengths)

    def episode_of(self, rows: Rows) -> Rows:
        """Number of the episode of each frame."""
        return np.asarray(np.searchsorted(self.ends, rows, side="right"))

    def columns(self, name: str) -> Shaped[np.ndarray, "n *shape"]:
        """Values of one feature for all frames, in order. They are kept, so do not change them.

        Raises:
            UserError: no such feature, or it is a camera; the files do not hold what the dataset says.
        """
        kept = vars(self).setdefault("_columns", {})
        if name not in kept:
            kept[name] = self.read(name, np.arange(self.num_episodes))
        return kept[name]

    def values(self, name: str, rows: Rows) -> Shaped[np.ndarray, "*b *shape"]:
        """Values of one feature for some frames; errors as of `columns`.

        Of a dataset of more than `FEW_FRAMES`, whose columns take long to read, their episodes alone are read until the
        whole column is there, which is read behind.
        """
        kept = vars(self).setdefault("_columns", {})
        if name in kept or self.num_frames <= FEW_FRAMES:
            return self.columns(name)[rows]
        if ("behind", name) not in kept:
            kept["behind", name] = behind(functools.partial(self.columns, name))
        if kept["behind", name].done():
            return kept["behind", name].result()[rows]
        episodes, number = np.unique(self.episode_of(rows), return_inverse=True)
        lengths = self.lengths[episodes]
        moved = (np.cumsum(lengths) - lengths) - (self.ends[episodes] - lengths)
        return self.read(name, episodes)[moved[number].reshape(np.shape(rows)) + rows]

    @abc.abstractmethod
    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> Shaped[np.ndarray, "n *shape"]:
        """Values of one feature for the frames of some episodes, in ascending order; errors as of `columns`."""

    @property
    @abc.abstractmethod
    def task_index(self) -> Int[np.ndarray, "n"]:
        """Index into `tasks` of each frame."""

    def task_numbers(self, rows: Rows) -> Rows:
        """Index into `tasks` of some frames, read as `values` are."""
        return self.task_index[rows]

    @property
    def shard_ends(self) -> Int[np.ndarray, "s"]:
        """For each file that is read as a whole, the frame after its last; one after another they fill the dataset."""
        return self.ends[-1:]

    @abc.abstractmethod
    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        """Frames of a camera, RGB.

        Raises:
            UserError: no such camera; a frame cannot be decoded. The message names the file and the episode.
            FileNotFoundError: a file is missing.
        """

    def camera_mask(self, camera: str) -> Bool[np.ndarray, "e"]:
        """False for episodes that lack a camera, whose pictures mean nothing then."""
        return np.ones(self.num_episodes, bool)

    def together(self, camera: str, row: Number) -> Int[np.ndarray, "n"]:
        """Frames that are best read with a frame, in order, itself among them: those decoded from one key frame."""
        return np.array([row])

    def key_distance(self, camera: str) -> float:
        """Mean number of frames per key frame of a camera's video, by its first file; 1 for pictures."""
        return 1.0

    @abc.abstractmethod
    def picture_files(self, camera: str) -> list[Path]:
        """Files that a camera's frames come from."""

    def task(self, i: Number) -> str:
        """Instruction of frame `i`."""
        return self.tasks[int(self.task_numbers(np.array([i]))[0])]

    def image(self, i: Number, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        """Frame `i` of a camera, RGB."""
        return self.images(camera, np.array([i]))[0]

    def chunk(
        self, i: Number | Rows, horizon: int, column: str = ACTION
    ) -> tuple[Shaped[np.ndarray, "*b ah d"], Bool[np.ndarray, "*b ah"]]:
        """The `horizon` values that start at frame `i`, and a mask that is False beyond the episode's end.

        Beyond the end the episode's last value is repeated.
        """
        start = np.asarray(i)
        end = self.ends[self.episode_of(start)][..., None]
        steps = start[..., None] + np.arange(horizon)
        return self.values(column, np.minimum(steps, end - 1)), steps < end

    def episode_keys(self) -> list[int]:
        """A number of 64 bits for each episode that depends on its states and actions alone.

        Copies of an episode in other formats, files or orders have the same one.
        """
        state, actions = (np.ascontiguousarray(self.columns(name), np.float32) for name in (STATE, ACTION))
        keys = []
        for episode in range(self.num_episodes):
            frames = slice(*self.episode_range(episode))
            digest = hashlib.sha256(state[frames].tobytes() + actions[frames].tobytes()).digest()
            keys.append(int.from_bytes(digest[:8], "big"))
        return keys

    def check_column(self, name: str) -> None:
        """Raises ValueError unless `name` is a feature that is no camera."""
        if name in self.cameras or name not in self.features:
            numeric = [key for key in self.features if key not in self.cameras]
            hint = did_you_mean(name, numeric, 0.4)
            raise UserError(f"{self.root} has no column {name!r}; its columns are {numeric}.{hint}")

    def check_camera(self, name: str) -> None:
        """Raises ValueError unless `name` is a camera."""
        if name not in self.cameras:
            hint = did_you_mean(name, self.cameras, 0.4)
            raise UserError(f"{self.root} has no camera {name!r}; its cameras are {list(self.cameras)}.{hint}")

    def report_skipped(self) -> None:
        """Logs what was left out."""
        if self.skipped:
            _log.warning(
                "%s: skipped %d of %d episodes", self.root, len(self.skipped), len(self.skipped) + self.num_episodes
            )
            for line in self.skipped_lines():
                _log.warning("  %s", line)

    def skipped_lines(self, shown: int = 3) -> list[str]:
        """What was left out, a line per reason with the names of `shown` episodes."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        return [f"{listed(names, shown)}: {reason}" for reason, names in reasons.items()]

    def annotations(self) -> dict[str, int]:
        """Words beside the instructions, such as subtasks: kind → how many there are."""
        return {}

    def check_files(self, cameras: Sequence[str]) -> None:  # noqa: B027  (most kinds check at opening)
        """Raises FileNotFoundError, once for all, if files of episodes, or pictures of these cameras, are missing."""


class Wrapped(Source):
    """A dataset that reads another one in another way; as it is, it changes nothing."""

    def __init__(self, source: Source):
        self.source = source
        self.root, self.fps, self.tasks, self.features = source.root, source.fps, source.tasks, dict(source.features)
        self.episodes, self.ends, self.skipped = source.episodes, source.ends, source.skipped
        self.recordings = source.recordings

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        return self.source.task_index

    @property
    def shard_ends(self) -> Int[np.ndarray, "s"]:
        return self.source.shard_ends

    def task_numbers(self, rows: Rows) -> Rows:
        return self.source.task_numbers(rows)

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> Shaped[np.ndarray, "n *shape"]:
        return self.source.read(name, episodes)

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        return self.source.images(camera, rows)

    def camera_mask(self, camera: str) -> Bool[np.ndarray, "e"]:
        return self.source.camera_mask(camera)

    def together(self, camera: str, row: Number) -> Int[np.ndarray, "n"]:
        return self.source.together(camera, row)

    def key_distance(self, camera: str) -> float:
        return self.source.key_distance(camera)

    def annotations(self) -> dict[str, int]:
        return self.source.annotations()

    def check_files(self, cameras: Sequence[str]) -> None:
        self.source.check_files(cameras)

    def picture_files(self, camera: str) -> list[Path]:
        return self.source.picture_files(camera)


class Renamed(Wrapped):
    """A dataset under the names that a robot uses.

    `keys` maps the name that the robot uses to the name in the dataset, or to several of them joined by " + ", whose
    values are put side by side. Features without an entry keep their names.

    Raises:
        UserError: the dataset lacks a named feature, or pictures are to be joined.
    """

    def __init__(self, source: Source, keys: dict[str, str]):
        super().__init__(source)
        self._keys = {new: [name.strip() for name in old.split("+")] for new, old in keys.items()}
        used = [old for parts in self._keys.values() for old in parts]
        if missing := sorted(set(used) - set(source.features)):
            raise UserError(
                f"{source.root} has no feature {missing}, which its `keys` name; it has {list(source.features)}."
                f"{did_you_mean(missing[0], source.features, 0.4)}"
            )
        self.features = {name: value for name, value in source.features.items() if name not in used}
        for new, parts in self._keys.items():
            self.features[new] = self._joined(new, parts)

    def _joined(self, new: str, parts: list[str]) -> dict[str, Any]:
        features = [self.source.features[part] for part in parts]
        if len(parts) == 1 and len(features[0]["shape"]) != 0:
            return features[0]
        if any(feature["dtype"] in ("video", "image") for feature in features):
            raise UserError(f"{new!r} joins {parts} of {self.source.root}, and pictures cannot be joined.")
        width = sum(int(np.prod(feature["shape"])) for feature in features)
        names = [feature.get("names") for feature in features]
        return {"dtype": features[0]["dtype"], "shape": (width,), "names": None if None in names else _flat(names)}

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> np.ndarray:
        self.check_column(name)
        parts = [self.source.read(part, episodes) for part in self._keys.get(name, [name])]
        if len(parts) == 1 and parts[0].ndim > 1:
            return parts[0]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)

    def images(self, camera: str, rows: Rows) -> np.ndarray:
        self.check_camera(camera)
        return self.source.images(self._name(camera), rows)

    def camera_mask(self, camera: str) -> np.ndarray:
        return self.source.camera_mask(self._name(camera))

    def together(self, camera: str, row: Number) -> np.ndarray:
        return self.source.together(self._name(camera), row)

    def key_distance(self, camera: str) -> float:
        return self.source.key_distance(self._name(camera))

    def picture_files(self, camera: str) -> list[Path]:
        return self.source.picture_files(self._name(camera))

    def check_files(self, cameras: Sequence[str]) -> None:
        self.source.check_files([self._name(camera) for camera in cameras])

    def _name(self, camera: str) -> str:
        return self._keys.get(camera, [camera])[0]


class Reordered(Wrapped):
    """A dataset whose vectors have their dimensions in another order.

    `orders` has, for each of them, the place in the dataset of each dimension.
    """

    def __init__(self, source: Source, orders: dict[str, list[int]]):
        super().__init__(source)
        self._orders = orders
        for name, order in orders.items():
            feature = source.features[name]
            names = dimension_names(feature)
            self.features[name] = {**feature, "names": None if names is None else [names[i] for i in order]}

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> np.ndarray:
        values = self.source.read(name, episodes)
        return values[:, self._orders[name]] if name in self._orders else values
