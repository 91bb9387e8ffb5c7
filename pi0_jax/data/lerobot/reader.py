"""Reads LeRobot datasets of versions 2.0, 2.1 and 3.0 with PyArrow and PyAV, without torch.

A dataset of version 3.0 is a folder:

    meta/info.json                                  features, frames per second, totals, path templates
    meta/tasks.parquet                              task_index and the instruction
    meta/episodes/chunk-000/file-000.parquet        a row an episode: length, where its rows and video frames are, stats
    meta/stats.json                                 statistics of each feature over the dataset
    data/chunk-000/file-000.parquet                 a row a frame: state, action, bookkeeping; many episodes in a file
    videos/<camera>/chunk-000/file-000.mp4          the frames, episode after episode

The frame of row i lies at `from_timestamp` of its episode + `timestamp` of the row, in seconds of the video.

Versions 2.0 and 2.1 have one parquet file an episode and one video an episode and camera, and their tasks and episodes
are JSON lines (`meta/tasks.jsonl`, `meta/episodes.jsonl`). In all of them a camera may be a column of encoded pictures
instead of video.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int, UInt8

from pi0_jax.data.lerobot.writer import BOOKKEEPING, LeRobotWriter
from pi0_jax.data.source import ACTION, STATE, VALID, BadEpisode, Rows, Source, cache_folder
from pi0_jax.data.video import Clip, FrameReader, VideoError, decode_once, decode_picture

__all__ = ["ACTION", "BOOKKEEPING", "STATE", "VALID", "LeRobotDataset", "LeRobotWriter", "find_dataset"]

VERSIONS = ("v2.0", "v2.1", "v3.0")
ROW_GROUPS_KEPT = 8
"""Row groups of encoded pictures kept in memory by each process."""

Decoding = Literal["once", "random"]


class _Episode(NamedTuple):
    """Where one episode is."""

    number: int
    """Its `episode_index`."""
    length: int
    data: str
    """Parquet file, relative to the dataset."""
    videos: dict[str, tuple[str, float]]
    """For each camera its video file and the second at which the episode begins there."""


class LeRobotDataset(Source):
    """Reads a LeRobot dataset.

    Args:
        root: folder of the dataset.
        cache: folder for decoded video; by default `.cache` inside the dataset, or one in the temporary folder where
            the dataset cannot be written to.
        decoding: "once": the first use of a camera decodes its video from beginning to end into a memory-mapped array
            in `cache`, after which any frame costs a copy; a changed video makes a new one. "random": frames are
            decoded when they are asked for.
        skip_bad_episodes: leave out episodes whose rows or video frames are missing or cannot be read, and log them,
            instead of raising at their first use. It looks into every file when the dataset is opened.
        without: numbers of episodes to leave out as well.

    Raises:
        FileNotFoundError: the folder, or a file that it should hold, is missing.
        ValueError: another version of the format, or a damaged file; no episode is left, or there is none of a number.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        *,
        decoding: Decoding = "once",
        skip_bad_episodes: bool = False,
        without: Sequence[int] = (),
    ):
        self.root = Path(root)
        self.decoding: Decoding = decoding
        self._cache = None if cache is None else Path(cache)
        self._info = _read_info(self.root)
        self.version: str = self._info["codebase_version"]
        """Version of the format: "v2.0", "v2.1" or "v3.0"."""
        self.features = {
            name: {**feature, "shape": _shape_of(feature)} for name, feature in self._info["features"].items()
        }
        self.fps = self._info["fps"]
        self._clip_cameras = tuple(name for name, feature in self.features.items() if feature["dtype"] == "video")
        read = self._read_episodes if self.version == "v3.0" else self._read_episodes_v2
        self.tasks = _read_tasks(self.root, self.version)
        everything = list(read())
        if unknown := sorted(set(without) - {episode.number for episode in everything}):
            raise ValueError(f"{self.root} has no episodes {unknown} to leave out; it has {len(everything)} in all.")
        self._all = everything
        bad = self._find_bad() if skip_bad_episodes else {}
        self.skipped = {f"episode {number}": reason for number, reason in sorted(bad.items()) if number not in without}
        left_out = {*bad, *without}
        self._table = [episode for episode in everything if episode.number not in left_out]
        if not self._table:
            first = f"; the first of {len(bad)}: {next(iter(bad.values()))}" if bad else ""
            raise ValueError(f"{self.root} has no episode that can be read{first}")
        vars(self).pop("_rows", None)
        self.episodes = [f"episode {episode.number}" for episode in self._table]
        self.ends = np.cumsum([episode.length for episode in self._table])
        self._frames: dict[str, np.ndarray] = {}
        total = sum(episode.length for episode in everything)
        if total != self._info["total_frames"] and not skip_bad_episodes:
            raise ValueError(
                f"{self.root} is damaged: meta/info.json counts {self._info['total_frames']} frames, the episodes in "
                f"meta/episodes {total}. Copy the dataset again."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_rows"} | {"_frames": {}}

    def read(self, name: str, first: int, end: int) -> np.ndarray:
        self.check_column(name)
        return self._read(name, first, end)

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        return self._bookkeeping("task_index")

    @property
    def shard_ends(self) -> Int[np.ndarray, "s"]:
        files = [episode.data for episode in self._table]
        last = [i for i in range(len(files)) if i + 1 == len(files) or files[i + 1] != files[i]]
        return self.ends[last]

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "n h w 3"]:
        self.check_camera(camera)
        if self.features[camera]["dtype"] == "image":
            return self._stored_pictures(camera, np.asarray(rows))
        if self.decoding == "once":
            return self.frames(camera)[rows]
        return self._decode(camera, np.asarray(rows))

    def frames(self, camera: str) -> UInt8[np.ndarray, "n h w 3"]:
        """All frames of a camera in order, RGB: a memory-mapped array that is decoded at the first call.

        Raises:
            FileNotFoundError: a video file is missing.
            ValueError: no such camera; the video is damaged, or not of the size that `meta/info.json` gives; no room
                for the decoded frames.
        """
        self.check_camera(camera)
        if camera not in self._frames:
            shape = (self.num_frames, *self.features[camera]["shape"])
            if self.features[camera]["dtype"] == "image":
                return self._stored_pictures(camera, np.arange(self.num_frames))
            folder = cache_folder(self.root, self._cache)
            try:
                self._frames[camera] = decode_once(camera, self._clips(camera), self.fps, shape, folder)
            except VideoError as error:
                raise self._explained(error) from error
        return self._frames[camera]

    def picture_files(self, camera: str) -> list[Path]:
        self.check_camera(camera)
        stored = self.features[camera]["dtype"] == "image"
        names = [episode.data if stored else episode.videos[camera][0] for episode in self._table]
        return [self.root / name for name in dict.fromkeys(names)]

    def video_of(self, camera: str, episode: int) -> tuple[Path, float]:
        """Video file of an episode, and the second at which it begins there."""
        name, start = self._table[episode].videos[camera]
        return self.root / name, start

    def seconds(self, camera: str) -> np.ndarray:
        """Time of each frame in its camera's video, seconds, `[n]`."""
        starts = np.array([episode.videos[camera][1] for episode in self._table])
        lengths = np.diff(self.ends, prepend=0)
        return np.repeat(starts, lengths) + self._bookkeeping("timestamp").astype(np.float64)

    def _bookkeeping(self, name: str) -> np.ndarray:
        kept = vars(self).setdefault("_columns", {})
        if name not in kept:
            kept[name] = self._read(name, 0, self.num_episodes, shape=(1,))
        return kept[name].reshape(-1)

    def _read(self, name: str, first: int, end: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
        width: tuple[int, ...] = self.features[name]["shape"] if shape is None else shape
        wanted = self._table[first:end]
        files = list(dict.fromkeys(episode.data for episode in wanted))
        numbers = {file: np.array([e.number for e in wanted if e.data == file]) for file in files}

        def part(file: str) -> np.ndarray:
            index, _ = self._rows_of(file)
            return _read_column(self.root / file, name, width, np.isin(index, numbers[file]))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return np.concatenate(list(pool.map(part, files)))

    def _rows_of(self, file: str) -> tuple[np.ndarray, dict[int, int]]:
        """The episode of each row of a data file, and the first row of each episode; checked against the episodes."""
        kept = vars(self).setdefault("_rows", {})
        if file not in kept:
            path = self.root / file
            expected = self._by_file[file]
            if not path.is_file():
                names = ", ".join(str(episode.number) for episode in expected[:5])
                raise FileNotFoundError(
                    f"{self.root} lacks {file}, which holds episode {names}. Copy the dataset again."
                )
            try:
                index = _read_column(path, "episode_index", (1,))[:, 0]
            except ValueError as error:
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
            kept[file] = index, {e.number: int(start) for e, start in zip(expected, starts, strict=True)}
        return kept[file]

    @functools.cached_property
    def _by_file(self) -> dict[str, list[_Episode]]:
        files: dict[str, list[_Episode]] = {}
        for episode in self._all:
            files.setdefault(episode.data, []).append(episode)
        return files

    def _read_episodes(self) -> Iterator[_Episode]:
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(f"{self.root} has no meta/episodes/*/*.parquet; a LeRobot v3.0 dataset has some.")
        keys = ["data", *(f"videos/{camera}" for camera in self._clip_cameras)]
        columns = ["episode_index", "dataset_from_index", "dataset_to_index"]
        columns += [f"{key}/{index}" for key in keys for index in ("chunk_index", "file_index")]
        columns += [f"videos/{camera}/from_timestamp" for camera in self._clip_cameras]
        table = {name: np.concatenate([_read_column(file, name, (1,))[:, 0] for file in files]) for name in columns}
        order = np.argsort(table["episode_index"], kind="stable")
        table = {name: values[order] for name, values in table.items()}
        begin, end = table["dataset_from_index"], table["dataset_to_index"]
        if begin[0] != 0 or (begin[1:] != end[:-1]).any() or (end <= begin).any():
            raise ValueError(f"{self.root}: the episodes in meta/episodes do not follow one another without gaps.")
        for i, number in enumerate(table["episode_index"].tolist()):
            videos = {}
            for camera in self._clip_cameras:
                chunk, file, start = (
                    table[f"videos/{camera}/{key}"][i] for key in ("chunk_index", "file_index", "from_timestamp")
                )
                name = self._info["video_path"].format(video_key=camera, chunk_index=chunk, file_index=file)
                videos[camera] = (name, float(start))
            chunk, file = table["data/chunk_index"][i], table["data/file_index"][i]
            data = self._info["data_path"].format(chunk_index=chunk, file_index=file)
            yield _Episode(number, int(end[i] - begin[i]), data, videos)

    def _read_episodes_v2(self) -> Iterator[_Episode]:
        for row in sorted(_read_lines(self.root / "meta/episodes.jsonl"), key=lambda row: row["episode_index"]):
            number = int(row["episode_index"])
            if int(row["length"]) < 1:
                raise ValueError(f"{self.root}/meta/episodes.jsonl gives episode {number} {row['length']} frames.")
            where = {"episode_chunk": number // self._info["chunks_size"], "episode_index": number}
            videos = {
                camera: (self._info["video_path"].format(video_key=camera, **where), 0.0)
                for camera in self._clip_cameras
            }
            yield _Episode(number, int(row["length"]), self._info["data_path"].format(**where), videos)

    def _clips(self, camera: str) -> list[Clip]:
        """Where the frames of a camera are."""
        numbers = np.rint(self.seconds(camera) * self.fps).astype(np.int64)
        files: dict[str, list[np.ndarray]] = {}
        for i, episode in enumerate(self._table):
            files.setdefault(episode.videos[camera][0], []).append(np.arange(*self.episode_range(i)))
        missing = [name for name in files if not (self.root / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.root} lacks {missing[:5]}, {len(missing)} files. Copy the dataset again.")
        rows = {name: np.concatenate(parts) for name, parts in files.items()}
        return [Clip(self.root / name, at, numbers[at]) for name, at in sorted(rows.items())]

    def _decode(self, camera: str, rows: np.ndarray) -> np.ndarray:
        reader = self.opened().setdefault("reader", FrameReader())
        flat = rows.ravel()
        episodes = self.episode_of(flat)
        times = self.seconds_of(camera, flat, episodes)
        out = np.empty((len(flat), *self.features[camera]["shape"]), np.uint8)
        files: dict[str, list[int]] = {}
        for i, episode in enumerate(episodes.tolist()):
            files.setdefault(self._table[episode].videos[camera][0], []).append(i)
        for name, at in files.items():
            try:
                reader.read(self.root / name, times[at], 0.5 / self.fps, out, np.array(at))
            except VideoError as error:
                raise self._explained(VideoError(str(error), flat[at][error.rows])) from error
        return out.reshape(*rows.shape, *out.shape[1:])

    def seconds_of(self, camera: str, rows: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        """Time of the given frames in their videos, seconds."""
        starts = np.array([self._table[episode].videos[camera][1] for episode in episodes.tolist()])
        return starts + self._bookkeeping("timestamp")[rows].astype(np.float64)

    def _stored_pictures(self, camera: str, rows: np.ndarray) -> np.ndarray:
        """Pictures that are kept in parquet, by row groups."""
        shape = self.features[camera]["shape"]
        out = np.empty((rows.size, *shape), np.uint8)
        order = np.argsort(rows.ravel(), kind="stable")
        episodes = self.episode_of(rows.ravel())
        for i in order.tolist():
            row, episode = int(rows.ravel()[i]), self._table[int(episodes[i])]
            first = self._rows_of(episode.data)[1][episode.number]
            within = first + row - self.episode_range(int(episodes[i]))[0]
            try:
                picture = decode_picture(self._encoded_picture(camera, episode.data, within))
            except (ValueError, OSError) as error:
                raise BadEpisode(
                    f"{self.root / episode.data}: picture of {camera!r} in row {within}, episode {episode.number}, "
                    f"cannot be decoded ({error})."
                ) from error
            if picture.shape != shape:
                raise BadEpisode(
                    f"{self.root / episode.data}: picture of {camera!r} in episode {episode.number} has shape "
                    f"{picture.shape}; meta/info.json says {shape}."
                )
            out[i] = picture
        return out.reshape(*rows.shape, *shape)

    def _encoded_picture(self, camera: str, file: str, row: int) -> bytes:
        groups = self.opened().setdefault("pictures", {})
        opened, ends = groups.get((file,)) or groups.setdefault((file,), _open_row_groups(self.root / file))
        group = int(np.searchsorted(ends, row, side="right"))
        key = (file, camera, group)
        if key not in groups:
            loaded = [k for k in groups if len(k) == 3]
            for old in loaded[: len(loaded) - ROW_GROUPS_KEPT + 1]:
                del groups[old]
            try:
                groups[key] = opened.read_row_group(group, columns=[camera])[camera].combine_chunks()
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"row group {group} cannot be read: {error}") from error
        value = groups[key][row - (int(ends[group - 1]) if group else 0)].as_py()
        if isinstance(value, dict):
            return value["bytes"] if value.get("bytes") is not None else (self.root / value["path"]).read_bytes()
        return value

    def _explained(self, error: VideoError) -> BadEpisode:
        """The error with the episodes that it concerns."""
        names = [self.episodes[e] for e in np.unique(self.episode_of(np.asarray(error.rows))).tolist()]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return BadEpisode(
            f"{error} This concerns {', '.join(names[:5])}{more} of {self.root}; `without_episodes` of a DatasetConfig "
            "leaves episodes out."
        )

    def _find_bad(self) -> dict[int, str]:
        """Episodes that cannot be read, and why: those of files with rows or values that are missing, and those with
        frames that their videos do not hold."""
        bad: dict[int, str] = {}
        usable = {}
        numeric = [name for name in self.features if name not in self.cameras and name not in BOOKKEEPING]
        for file, episodes in self._by_file.items():
            try:
                self._rows_of(file)
                usable[file] = _read_column(self.root / file, "timestamp", (1,))[:, 0]
                for name in numeric:
                    bad |= self._find_uneven(file, name)
            except (ValueError, OSError) as error:
                bad |= {episode.number: str(error) for episode in episodes}
                usable.pop(file, None)
        by_video: dict[str, list[tuple[_Episode, np.ndarray]]] = {}
        for file, timestamps in usable.items():
            _, starts = self._rows_of(file)
            for episode in self._by_file[file]:
                within = timestamps[starts[episode.number] : starts[episode.number] + episode.length]
                for name, start in episode.videos.values():
                    by_video.setdefault(name, []).append((episode, start + within.astype(np.float64)))

        def look(name: str) -> dict[int, str]:
            path, reader, found = self.root / name, FrameReader(), {}
            for episode, times in by_video[name]:
                try:
                    reader.locate(path, times, 0.5 / self.fps)
                except (ValueError, OSError) as error:
                    found[episode.number] = str(error)
            return found

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for found in pool.map(look, by_video):
                bad |= found
        return bad

    def _find_uneven(self, file: str, name: str) -> dict[int, str]:
        """Episodes of a file with rows of another length than the column's."""
        bad: dict[int, str] = {}
        index, _ = self._rows_of(file)
        while True:
            try:
                _read_column(self.root / file, name, self.features[name]["shape"], ~np.isin(index, list(bad)))
                return bad
            except _Uneven as error:
                bad[error.episode] = str(error)


def find_dataset(path: str, offline: bool = False) -> Path:
    """Folder of a dataset that is on this machine, or is fetched from the Hugging Face hub.

    Args:
        path: a folder, or "hf://owner/name".
        offline: take the hub's datasets from its cache on this machine, and ask nobody.

    Raises:
        ValueError: the hub is asked for and `huggingface_hub` is not installed.
    """
    if not path.startswith("hf://"):
        return Path(path).expanduser()
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{path} is on the Hugging Face hub, which needs: pip install pi0_jax[hub]") from error
    return Path(snapshot_download(path.removeprefix("hf://"), repo_type="dataset", local_files_only=offline))


def _read_info(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}. Record demonstrations into it, or set `data.path`.")
    path = root / "meta/info.json"
    if not path.is_file():
        raise FileNotFoundError(f"{root} has no meta/info.json; expected the folder of a LeRobot dataset.")
    try:
        info = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy the dataset again.") from error
    if info.get("codebase_version") not in VERSIONS:
        raise ValueError(
            f"{root} is a LeRobot dataset of version {info.get('codebase_version')}; {', '.join(VERSIONS)} can be read."
        )
    return info


def _shape_of(feature: dict[str, Any]) -> tuple[int, ...]:
    """The shape in `meta/info.json`; of pictures with channels last, where versions 2 may have them first."""
    shape = tuple(feature["shape"])
    if feature["dtype"] in ("video", "image") and shape[0] == 3 != shape[-1]:
        return *shape[1:], 3
    return shape


def _read_tasks(root: Path, version: str) -> list[str]:
    """Instructions by task index."""
    if version == "v3.0":
        path = root / "meta/tasks.parquet"
        table = _read_table(path)
        # pandas names the column of an unnamed index so; lerobot wrote it without a name for a while.
        column = "task" if "task" in table.column_names else "__index_level_0__"
        rows = {row["task_index"]: row[column] for row in table.to_pylist()}
    else:
        path = root / "meta/tasks.jsonl"
        rows = {row["task_index"]: row["task"] for row in _read_lines(path)}
    if sorted(rows) != list(range(len(rows))):
        raise ValueError(f"{path} numbers its tasks {sorted(rows)}; expected 0 to {len(rows) - 1}.")
    return [rows[i] for i in range(len(rows))]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; a LeRobot dataset of version 2 has one. Copy the dataset again.")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}). Copy the dataset again.") from error
    return rows


def _open_row_groups(path: Path) -> tuple[pq.ParquetFile, np.ndarray]:
    opened = pq.ParquetFile(path, memory_map=True)
    sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    return opened, np.cumsum(sizes)


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path}. Copy the dataset again.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}). Copy the dataset again.") from error


def _read_column(
    path: Path, name: str, shape: tuple[int, ...], keep: Bool[np.ndarray, "n"] | None = None
) -> np.ndarray:
    """One column of a parquet file, or those rows of it, `[n, *shape]`; text as an array of objects."""
    table = _read_table(path, [name])
    if name not in table.column_names:
        raise ValueError(f"{path} has no column {name!r}, which meta/info.json or the LeRobot format promises.")
    column = table[name].combine_chunks()
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


class _Uneven(BadEpisode):
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
    episode = int(_read_table(path, ["episode_index"])["episode_index"].to_numpy()[row])
    return _Uneven(f"{message}; row {row}, in episode {episode}, has {lengths[wrong[0]]}.", episode)
