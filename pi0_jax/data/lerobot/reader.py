"""Reads LeRobot datasets with PyArrow and PyAV, without torch; `layout.py` describes the format."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from pi0_jax.data.files import cache_folder
from pi0_jax.data.lerobot import layout
from pi0_jax.data.source import BadEpisode, Rows, Source
from pi0_jax.data.video import FrameReader, VideoError, decode_once, decode_picture
from pi0_jax.errors import UserError

Decoding = Literal["once", "random"]
ROW_GROUPS_KEPT = 8
"""Row groups of encoded pictures kept in memory by each thread."""


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
        UserError: another version of the format, or a damaged file; no episode is left, or there is none of a number.
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
        info = layout.read_info(self.root)
        self.version: str = info["codebase_version"]
        """Version of the format: "v2.0", "v2.1" or "v3.0"."""
        self.features, self.fps = info["features"], info["fps"]
        self.tasks = layout.read_tasks(self.root, self.version)
        everything = layout.read_episodes(self.root, info)
        if unknown := sorted(set(without) - {episode.number for episode in everything}):
            raise UserError(f"{self.root} has no episodes {unknown} to leave out; it has {len(everything)} in all.")
        self._rows = layout.RowIndex(self.root, everything)
        bad = _find_bad(self._rows, self.features, self.fps) if skip_bad_episodes else {}
        self.skipped = {f"episode {number}": reason for number, reason in sorted(bad.items()) if number not in without}
        left_out = {*bad, *without}
        self._table = [episode for episode in everything if episode.number not in left_out]
        if not self._table:
            first = f"; the first of {len(bad)}: {next(iter(bad.values()))}" if bad else ""
            raise UserError(f"{self.root} has no episode that can be read{first}")
        self.episodes = [f"episode {episode.number}" for episode in self._table]
        self.ends = np.cumsum([episode.length for episode in self._table])
        self._frames: dict[str, np.ndarray] = {}
        total = sum(episode.length for episode in everything)
        if total != info["total_frames"] and not skip_bad_episodes:
            raise UserError(
                f"{self.root} is damaged: meta/info.json counts {info['total_frames']} frames, the episodes in "
                f"meta/episodes {total}. Copy the dataset again."
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_frames": {}}

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

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        self.check_camera(camera)
        if self.features[camera]["dtype"] == "image":
            return self._stored_pictures(camera, np.asarray(rows))
        if self.decoding == "once":
            return self.frames(camera)[rows]
        rows = np.asarray(rows)
        out = np.empty((rows.size, *self.features[camera]["shape"]), np.uint8)
        self._decode(self.opened().setdefault("reader", FrameReader()), camera, rows.ravel(), out)
        return out.reshape(*rows.shape, *out.shape[1:])

    def frames(self, camera: str) -> UInt8[np.ndarray, "n h w 3"]:
        """All frames of a camera in order, RGB: a memory-mapped array that is decoded at the first call.

        Raises:
            FileNotFoundError: a video file is missing.
            UserError: no such camera; the video is damaged, or not of the size that `meta/info.json` gives; no room
                for the decoded frames.
        """
        self.check_camera(camera)
        if camera not in self._frames:
            rows = np.arange(self.num_frames)
            if self.features[camera]["dtype"] == "image":
                return self._stored_pictures(camera, rows)
            files, folder = self.picture_files(camera), cache_folder(self.root, self._cache)
            key = repr(self.fps).encode() + self.seconds(camera, rows).tobytes()
            shape = (self.num_frames, *self.features[camera]["shape"])
            self._frames[camera] = decode_once(
                camera,
                files,
                key,
                shape,
                folder,
                functools.partial(self._decode, FrameReader(1, threaded=True), camera, rows),
            )
        return self._frames[camera]

    def picture_files(self, camera: str) -> list[Path]:
        self.check_camera(camera)
        stored = self.features[camera]["dtype"] == "image"
        names = [episode.data if stored else episode.videos[camera][0] for episode in self._table]
        return [self.root / name for name in dict.fromkeys(names)]

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

        def read_file(file: str) -> np.ndarray:
            index, _ = self._rows.locate(file)
            return layout.read_column(self.root / file, name, width, np.isin(index, numbers[file]))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return np.concatenate(list(pool.map(read_file, files)))

    def _decode(
        self, reader: FrameReader, camera: str, rows: np.ndarray, out: np.ndarray, progress: tqdm | None = None
    ) -> None:
        times, files = self.seconds(camera, rows), {}
        for i, episode in enumerate(self.episode_of(rows).tolist()):
            files.setdefault(self._table[episode].videos[camera][0], []).append(i)
        for name, places in files.items():
            at = np.array(places)
            try:
                reader.read(self.root / name, times[at], self.fps, out, at, progress)
            except VideoError as error:
                raise self._explained(error, rows[at][error.rows]) from error

    def seconds(self, camera: str, rows: Rows) -> Float[np.ndarray, "n"]:
        """Time of frames in their camera's video, seconds."""
        starts = np.array([episode.videos[camera][1] for episode in self._table])
        return starts[self.episode_of(rows)] + self._bookkeeping("timestamp")[rows].astype(np.float64)

    def _stored_pictures(self, camera: str, rows: np.ndarray) -> np.ndarray:
        """Pictures that are kept in parquet."""
        reader = self.opened().setdefault("pictures", _StoredPictures(self.root))
        shape = self.features[camera]["shape"]
        out = np.empty((rows.size, *shape), np.uint8)
        order = np.argsort(rows.ravel(), kind="stable")
        episodes = self.episode_of(rows.ravel())
        for i in order.tolist():
            row, episode = int(rows.ravel()[i]), self._table[int(episodes[i])]
            first = self._rows.locate(episode.data)[1][episode.number]
            within = first + row - self.episode_range(int(episodes[i]))[0]
            try:
                picture = reader.read(episode.data, camera, within)
                if picture.shape != shape:
                    raise UserError(f"its shape is {picture.shape}; meta/info.json says {shape}")
            except (ValueError, OSError) as error:
                raise BadEpisode(
                    f"{self.root / episode.data}: picture of {camera!r} in row {within}, episode {episode.number}, "
                    f"cannot be decoded ({error})."
                ) from error
            out[i] = picture
        return out.reshape(*rows.shape, *shape)

    def _explained(self, error: VideoError, rows: np.ndarray) -> BadEpisode:
        """The error with the episodes of the rows that it concerns."""
        names = [self.episodes[e] for e in np.unique(self.episode_of(rows)).tolist()]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return BadEpisode(
            f"{error} This concerns {', '.join(names[:5])}{more} of {self.root}; `without_episodes` of a DatasetConfig "
            "leaves episodes out."
        )


class _StoredPictures:
    """Reads pictures of one dataset. Not for several threads: each has its own."""

    def __init__(self, root: Path):
        self._root = root
        self._files: dict[str, tuple[pq.ParquetFile, np.ndarray]] = {}
        self._groups: dict[tuple[str, str, int], pa.Array] = {}

    def read(self, file: str, camera: str, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """One picture, RGB.

        Raises:
            OSError, UserError: it cannot be read or decoded.
        """
        if file not in self._files:
            opened = pq.ParquetFile(self._root / file, memory_map=True)
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            self._files[file] = opened, np.cumsum(sizes)
        opened, ends = self._files[file]
        group = int(np.searchsorted(ends, row, side="right"))
        if (file, camera, group) not in self._groups:
            for old in list(self._groups)[: len(self._groups) - ROW_GROUPS_KEPT + 1]:
                del self._groups[old]
            try:
                column = opened.read_row_group(group, columns=[camera])[camera]
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"row group {group} cannot be read: {error}") from error
            self._groups[file, camera, group] = column.combine_chunks()
        value: Any = self._groups[file, camera, group][row - (int(ends[group - 1]) if group else 0)].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else (self._root / value["path"]).read_bytes()
        return decode_picture(value)


def _find_bad(rows: layout.RowIndex, features: dict[str, dict], fps: int | float) -> dict[int, str]:
    """Episodes that cannot be read, by number, and why: those of files with rows or values that are missing, and those
    with frames that their videos do not hold."""
    bad: dict[int, str] = {}
    usable: dict[str, np.ndarray] = {}
    pictures = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
    numeric = [name for name in features if name not in pictures and name not in layout.BOOKKEEPING]
    for file, episodes in rows.episodes.items():
        try:
            rows.locate(file)
            usable[file] = layout.read_column(rows.root / file, "timestamp", (1,))[:, 0]
            for name in numeric:
                bad |= _find_uneven(rows, file, name, features[name]["shape"])
        except (ValueError, OSError) as error:
            bad |= {episode.number: str(error) for episode in episodes}
            usable.pop(file, None)
    by_video: dict[str, list[tuple[layout.Episode, np.ndarray]]] = {}
    for file, timestamps in usable.items():
        _, starts = rows.locate(file)
        for episode in rows.episodes[file]:
            within = timestamps[starts[episode.number] : starts[episode.number] + episode.length]
            for name, start in episode.videos.values():
                by_video.setdefault(name, []).append((episode, start + within.astype(np.float64)))

    def look(name: str) -> dict[int, str]:
        path, reader, found = rows.root / name, FrameReader(), {}
        for episode, times in by_video[name]:
            try:
                reader.locate(path, times, fps)
            except (ValueError, OSError) as error:
                found[episode.number] = str(error)
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(look, by_video):
            bad |= found
    return bad


def _find_uneven(rows: layout.RowIndex, file: str, name: str, shape: tuple[int, ...]) -> dict[int, str]:
    """Episodes of a file with rows of another length than the column's."""
    bad: dict[int, str] = {}
    index, _ = rows.locate(file)
    while True:
        try:
            layout.read_column(rows.root / file, name, shape, ~np.isin(index, list(bad)))
            return bad
        except layout.Uneven as error:
            bad[error.episode] = str(error)
