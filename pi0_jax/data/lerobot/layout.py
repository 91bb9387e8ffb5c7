"""The LeRobot format, versions 2.0, 2.1 and 3.0: its files, read without torch.

A dataset of version 3.0 is a folder:

    meta/info.json                                  features, frames per second, totals, path templates
    meta/tasks.parquet                              task_index and the instruction
    meta/episodes/chunk-000/file-000.parquet        one row per episode: length, place of its rows and frames, stats
    meta/stats.json                                 statistics of each feature over the dataset
    data/chunk-000/file-000.parquet                 one row per frame: state, action, bookkeeping; many episodes a file
    videos/<camera>/chunk-000/file-000.mp4          the frames, episode after episode

Episodes follow one another in a video, so the frame of a row is found by counting. `from_timestamp` of its episode +
`timestamp` of the row, in seconds of the video, should say the same, but drifts in datasets that were joined.

Versions 2.0 and 2.1 have one parquet file per episode and one video per episode and camera, and their tasks and
episodes are JSON lines (`meta/tasks.jsonl`, `meta/episodes.jsonl`). In all of them a camera may be a column of encoded
pictures instead of video.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool

from pi0_jax.data.files import advice, read_json
from pi0_jax.data.foreign import V1
from pi0_jax.data.source import BadEpisode
from pi0_jax.errors import UserError, listed

VERSION = "v3.0"
VERSIONS = ("v2.0", "v2.1", VERSION)
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES_PER_CHUNK = 1000
SMALL = 2**14
"""Rows of a parquet file up to which it is read in one thread."""
INFO = ("fps", "features", "total_frames", "data_path")
"""What meta/info.json has to say."""
BOOKKEEPING: dict[str, dict[str, Any]] = {
    name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": (1,), "names": None}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index")
}
"""Columns that every dataset has. `timestamp` is in seconds from the start of the episode."""


class Place(NamedTuple):
    """Where the frames of an episode are."""

    file: str
    """Video file, relative to the dataset."""
    start: float
    """Second of the video at which the episode begins, by the metadata."""
    first: int
    """Number of its first frame in the file, by the lengths of the episodes before it."""
    total: int
    """Frames that the file should have."""


class Episode(NamedTuple):
    """Place of one episode."""

    number: int
    """Its `episode_index`."""
    length: int
    data: str
    """Parquet file, relative to the dataset."""
    videos: dict[str, Place]
    """By camera."""


def read_info(root: Path) -> dict[str, Any]:
    """Content of `meta/info.json`, with the shape of pictures channels last.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        UserError: the file is damaged, or another version of the format.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; expected that of a LeRobot or RLDS dataset.")
    info = read_json(root / "meta/info.json", "the folder of a LeRobot dataset")
    _check_info(root, info)
    info["features"] = {name: {**entry, "shape": _shape(entry)} for name, entry in info["features"].items()}
    return info


def _check_info(root: Path, info: Any) -> None:
    """Refuses a `meta/info.json` of another version, or without what reading needs."""
    if not isinstance(info, dict):
        raise UserError(f"{root}/meta/info.json holds no object. Copy the dataset again.")
    if (version := info.get("codebase_version")) not in VERSIONS:
        known = f"{root} is a LeRobot dataset of version {version}; {', '.join(VERSIONS)} can be read."
        raise UserError(f"{known} {V1}" if str(version).startswith("v1") else known)
    if missing := [name for name in INFO if name not in info]:
        raise UserError(
            f"{root}/meta/info.json lacks {missing}, which every LeRobot dataset has. Copy the dataset again."
        )
    if bad := [name for name, entry in info["features"].items() if not {"dtype", "shape"} <= set(entry)]:
        raise UserError(f"{root}/meta/info.json does not say dtype and shape of the features {bad}.")
    if any(entry["dtype"] == "video" for entry in info["features"].values()) and not info.get("video_path"):
        raise UserError(
            f"{root}/meta/info.json has features that are video, and no `video_path`. Copy the dataset again."
        )
    if not isinstance(info["fps"], int | float) or not info["fps"] > 0:
        raise UserError(f"{root}/meta/info.json gives {info['fps']!r} frames per second; expected a number above 0.")


def _shape(feature: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a feature; of pictures with channels last, where versions 2 may have them first, and three of them,
    as grey ones are decoded too."""
    shape = tuple(feature["shape"])
    if feature["dtype"] not in ("video", "image") or len(shape) != 3:
        return shape
    return (*shape[1:], 3) if shape[0] in (1, 3) and shape[-1] not in (1, 3) else (*shape[:2], 3)


def read_tasks(root: Path, version: str) -> list[str]:
    """Instructions by task index."""
    if version == VERSION:
        path = root / "meta/tasks.parquet"
        table = read_table(path)
        # pandas names the column of an unnamed index so; lerobot wrote it without a name for a while.
        column = "task" if "task" in table.column_names else "__index_level_0__"
        rows = {row["task_index"]: row[column] for row in table.to_pylist()}
    else:
        path = root / "meta/tasks.jsonl"
        rows = {row["task_index"]: row["task"] for row in _read_lines(path, ("task_index", "task"))}
    if missing := sorted(set(range(max(rows, default=0) + 1)) - set(rows)):
        raise UserError(
            f"{path} has no task {listed(list(map(str, missing)))}, of 0 to {max(rows, default=0)}. Copy the file "
            f"again; or, if tasks were removed, give it a row for each, {{task_index: {missing[0]}, task: ''}}: "
            "episodes of an empty task are then named, and left out."
        )
    return ["" if rows[i] is None else str(rows[i]) for i in range(len(rows))]


def read_episodes(root: Path, info: dict[str, Any]) -> list[Episode]:
    """All episodes in order, by their files of metadata.

    Raises:
        FileNotFoundError: a file is missing.
        UserError: a file is damaged, or contradicts itself.
    """
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    read = _read_episodes if info["codebase_version"] == VERSION else _read_episodes_v2
    with collected_later():
        episodes = read(root, info, cameras)
    numbers = [episode.number for episode in episodes]
    if twice := sorted({a for a, b in itertools.pairwise(numbers) if a == b}):
        raise UserError(
            f"{root} lists episodes {twice[:5]} more than once in meta/; an index stands for one episode. If datasets "
            "were joined by copying files together, name them apart in `data.datasets`; otherwise remove the second "
            "entry."
        )
    return episodes


def _read_episodes(root: Path, info: dict[str, Any], cameras: list[str]) -> list[Episode]:
    files = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root} has no meta/episodes/*/*.parquet; a LeRobot v3.0 dataset has some.")
    keys = ["data", *(f"videos/{camera}" for camera in cameras)]
    columns = ["episode_index", "dataset_from_index", "dataset_to_index"]
    columns += [f"{key}/{index}" for key in keys for index in ("chunk_index", "file_index")]
    columns += [f"videos/{camera}/from_timestamp" for camera in cameras]
    table = {name: np.concatenate([read_column(file, name, (1,))[:, 0] for file in files]) for name in columns}
    order = np.argsort(table["episode_index"], kind="stable")
    table = {name: values[order] for name, values in table.items()}
    begin, end = table["dataset_from_index"], table["dataset_to_index"]
    if begin[0] != 0 or (begin[1:] != end[:-1]).any() or (end <= begin).any():
        raise UserError(f"{root}: the episodes in meta/episodes do not follow one another without gaps.")
    lengths = (end - begin).tolist()

    @functools.cache
    def file_name(template: str, camera: str, chunk: int, file: int) -> str:
        return template.format(video_key=camera, chunk_index=chunk, file_index=file)

    def file_names(key: str, template: str, camera: str = "") -> list[str]:
        indices = (table[f"{key}/{index}"].tolist() for index in ("chunk_index", "file_index"))
        return [file_name(template, camera, *where) for where in zip(*indices, strict=True)]

    places = []
    for camera in cameras:
        starts = table[f"videos/{camera}/from_timestamp"].tolist()
        places.append(_places(file_names(f"videos/{camera}", info["video_path"], camera), starts, lengths))
    videos = [dict(zip(cameras, each, strict=True)) for each in zip(*places, strict=True)] or [{} for _ in lengths]
    data = file_names("data", info["data_path"])
    return [Episode(*each) for each in zip(table["episode_index"].tolist(), lengths, data, videos, strict=True)]


def _places(files: list[str], starts: list[float], lengths: list[int]) -> list[Place]:
    """Where the frames of all episodes are of one camera, whose files and starts are given, by counting."""
    inside: dict[str, list[int]] = {}
    for i, file in enumerate(files):
        inside.setdefault(file, []).append(i)
    places: dict[int, Place] = {}
    for file, members in inside.items():
        total, first = sum(lengths[i] for i in members), 0
        for i in sorted(members, key=starts.__getitem__):
            places[i] = Place(file, float(starts[i]), first, total)
            first += lengths[i]
    return [places[i] for i in range(len(files))]


def _read_episodes_v2(root: Path, info: dict[str, Any], cameras: list[str]) -> list[Episode]:
    episodes = []
    rows = _read_lines(root / "meta/episodes.jsonl", ("episode_index", "length"))
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        number = int(row["episode_index"])
        if int(row["length"]) < 1:
            raise UserError(f"{root}/meta/episodes.jsonl gives episode {number} {row['length']} frames.")
        where = {"episode_chunk": number // info.get("chunks_size", FILES_PER_CHUNK), "episode_index": number}
        length = int(row["length"])
        videos = {
            camera: Place(info["video_path"].format(video_key=camera, **where), 0.0, 0, length) for camera in cameras
        }
        episodes.append(Episode(number, length, info["data_path"].format(**where), videos))
    return episodes


def _read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, each of which has the `keys`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; a LeRobot dataset of version 2 has one. Copy the dataset again.")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {path} is not JSON ({error}). {advice(path)}") from error
        if not isinstance(row, dict) or not set(keys) <= set(row):
            raise UserError(f"line {number} of {path} is {line[:80]}; expected an object with {' and '.join(keys)}.")
        rows.append(row)
    return rows


@contextlib.contextmanager
def collected_later() -> Iterator[None]:
    """Without Python's search for reference cycles, which goes through all objects again and again while many are made:
    half the time that 100,000 episodes take."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class RowIndex:
    """The episode of each row of the data files, checked against the episodes of the metadata."""

    def __init__(self, root: Path, episodes: list[Episode]):
        self.root = root
        self.episodes: dict[str, list[Episode]] = {}
        """By data file."""
        with collected_later():
            for episode in episodes:
                self.episodes.setdefault(episode.data, []).append(episode)
        self._located: dict[str, tuple[np.ndarray, dict[int, int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_located": {}}

    def locate(self, file: str) -> tuple[np.ndarray, dict[int, int]]:
        """The number of the episode of each row of a data file, and the first row of each episode.

        Raises:
            FileNotFoundError: the file is missing.
            BadEpisode: it does not hold the rows that the metadata promise.
        """
        if file not in self._located:
            self._locate(file, [])
        return self._located[file]

    def read(self, file: str, name: str, shape: tuple[int, ...], numbers: Sequence[int]) -> np.ndarray:
        """One column of a data file in the rows of some episodes, given by number; errors as of `locate` and
        `read_column`. A file that was not looked into is opened once for both."""
        table = None if file in self._located else self._locate(file, [name])
        keep = np.isin(self._located[file][0], numbers)
        return read_column(self.root / file, name, shape, keep, table)

    def _locate(self, file: str, others: list[str]) -> pa.Table:
        """Finds the episodes of a data file, and reads its column of them and other ones."""
        path = self.root / file
        expected = self.episodes[file]
        if not path.is_file():
            names = ", ".join(str(episode.number) for episode in expected[:5])
            raise FileNotFoundError(f"{self.root} lacks {file}, which holds episode {names}. Copy the dataset again.")
        try:
            table = read_table(path, list({"episode_index", *others}))
            index = read_column(path, "episode_index", (1,), table=table)[:, 0]
        except UserError as error:
            raise BadEpisode(f"{error} It holds episode {expected[0].number}.") from error
        lengths = np.array([episode.length for episode in expected])
        if not np.array_equal(index, np.repeat([episode.number for episode in expected], lengths)):
            for episode in expected:
                if (found := int((index == episode.number).sum())) != episode.length:
                    raise BadEpisode(
                        f"{path} is damaged: it has {found} rows of episode {episode.number}, the episodes in meta "
                        f"{episode.length}; it has {len(index)} rows, the episodes {lengths.sum()}. Copy the "
                        "dataset again."
                    )
            raise BadEpisode(f"{path} does not hold its episodes one after the other, as the format does.")
        starts = np.cumsum(lengths) - lengths
        self._located[file] = index, {e.number: int(start) for e, start in zip(expected, starts, strict=True)}
        return table


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        file = pq.ParquetFile(path, memory_map=True)
        return file.read(
            columns=columns, use_threads=file.metadata.num_rows > SMALL
        )  # threads cost more than they give
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path}. Copy the dataset again.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}). {advice(path)}") from error


def read_column(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    keep: Bool[np.ndarray, "n"] | None = None,
    table: pa.Table | None = None,
) -> np.ndarray:
    """One column of a parquet file, or those rows of it, `[n, *shape]`; text as an array of objects. `table` is what
    was read of the file already."""
    read: Any = read_table(path, [name]) if table is None else table
    if name not in read.column_names:
        raise UserError(f"{path} has no column {name!r}, which meta/info.json or the LeRobot format promises.")
    column = read[name].combine_chunks()
    if keep is not None and not keep.all():
        column = column.filter(pa.array(keep))
    flat = column
    while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        flat = flat.flatten()
    values = flat.to_numpy(zero_copy_only=False)
    if values.size != len(column) * math.prod(shape):
        message = f"{path}: column {name!r} has {values.size} values in {len(column)} rows of shape {shape}"
        raise _uneven(path, column, shape, keep, message)
    return values.reshape(len(column), *shape)


class Uneven(BadEpisode):
    """A row of another length than the others, and the number of its episode."""

    def __init__(self, message: str, episode: int):
        super().__init__(message)
        self.episode = episode


def _uneven(
    path: Path, column: pa.Array, shape: tuple[int, ...], keep: Bool[np.ndarray, "n"] | None, message: str
) -> BadEpisode:
    """The error for a column with too few or too many values, with the first row to blame if there is one."""
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        return BadEpisode(f"{message}.")
    lengths = (
        np.diff(column.offsets.to_numpy())
        if pa.types.is_list(column.type)
        else np.array([len(row or ()) for row in column.to_pylist()])
    )
    if not (wrong := np.flatnonzero(lengths != math.prod(shape[:1]))).size:
        return BadEpisode(f"{message}.")
    row = int(wrong[0] if keep is None else np.flatnonzero(keep)[wrong[0]])
    episode = int(read_table(path, ["episode_index"])["episode_index"].to_numpy()[row])
    return Uneven(f"{message}; row {row}, in episode {episode}, has {lengths[wrong[0]]}.", episode)
