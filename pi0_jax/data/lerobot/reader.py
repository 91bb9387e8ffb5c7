"""Reads LeRobot datasets with PyArrow and PyAV, without torch; `layout.py` describes the format."""

from __future__ import annotations

import concurrent.futures
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, UInt8

from pi0_jax.config.data import PromptFrom
from pi0_jax.data.lerobot import layout
from pi0_jax.data.lerobot.language import Language, make_prompts
from pi0_jax.data.source import BadEpisode, Number, Rows, Source
from pi0_jax.data.video import FrameReader, VideoError, decode_picture
from pi0_jax.errors import UserError, listed

TIMES_LOOKED_AT = 3
"""Episodes per thread whose times are held against the count of their frames."""
ROW_GROUPS_KEPT = 8
"""Row groups of encoded pictures kept in memory by each thread."""

_log = logging.getLogger(__name__)


class LeRobotDataset(Source):
    """Reads a LeRobot dataset.

    Args:
        root: folder of the dataset.
        skip_bad_episodes: leave out episodes whose rows or video frames are missing or cannot be read, and log them,
            instead of raising at their first use. It looks into every file when the dataset is opened.
        without: numbers of episodes to leave out as well.
        prompt_from: what `tasks` are, see `DatasetConfig`.

    Raises:
        FileNotFoundError: the folder, or a file that it should hold, is missing.
        UserError: another version of the format, or a damaged file; no episode is left, or there is none of a number;
            or no subtask for `prompt_from`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        skip_bad_episodes: bool = False,
        without: Sequence[int] = (),
        prompt_from: PromptFrom = "task",
    ):
        self.root = Path(root)
        self._strict = not skip_bad_episodes and not without
        info = layout.read_info(self.root)
        self.version: str = info["codebase_version"]
        """Version of the format: "v2.0", "v2.1" or "v3.0"."""
        self._described, self.fps = list(info["features"]), info["fps"]
        self.features = {name: each for name, each in info["features"].items() if each["dtype"] != "language"}
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
        total = sum(episode.length for episode in everything)
        self.miscounted: str | None = None
        """Contradiction between `meta/info.json` and the episodes, which is an error without `skip_bad_episodes`."""
        if total != info["total_frames"]:
            self.miscounted = (
                f"{self.root} is damaged: meta/info.json counts {info['total_frames']} frames, the episodes in "
                f"meta/episodes {total}. Copy the dataset again, or correct `total_frames` if all episodes are there."
            )
        if self.miscounted and not skip_bad_episodes:
            raise UserError(self.miscounted)
        self._prompts: np.ndarray | None = None
        if prompt_from != "task":
            subtasks = self._language().subtasks(self._bookkeeping("timestamp"))
            self.tasks, self._prompts = make_prompts(self.tasks, self.task_index, subtasks, prompt_from)

    def _language(self) -> Language:
        return Language(self._rows, self._table, self._described)

    def annotations(self) -> dict[str, int]:
        return self._language().styles()

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> np.ndarray:
        self.check_column(name)
        return self._read(name, episodes)

    def task_numbers(self, rows: Rows) -> Rows:
        if self._prompts is not None or "task_index" not in self.features:
            return self.task_index[rows]
        return self.values("task_index", rows).reshape(np.shape(rows))

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        if self._prompts is not None:
            return self._prompts
        known = "task_index" in vars(self).get("_columns", {})
        index = self._bookkeeping("task_index")
        if not known and (wrong := (index < 0) | (index >= len(self.tasks))).any():
            first = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{self.root}: {self.episodes[int(self.episode_of(np.array(first)))]} has task_index {index[first]}; "
                f"meta/ has {len(self.tasks)} tasks, counted from 0. Copy the dataset again."
            )
        return index

    @property
    def shard_ends(self) -> Int[np.ndarray, "s"]:
        files = [episode.data for episode in self._table]
        last = [i for i in range(len(files)) if i + 1 == len(files) or files[i + 1] != files[i]]
        return self.ends[last]

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        self.check_camera(camera)
        if self.features[camera]["dtype"] == "image":
            return self._stored_pictures(camera, np.asarray(rows))
        rows = np.asarray(rows)
        flat, reader = rows.ravel(), self._reader()
        out = np.empty((flat.size, *self.features[camera]["shape"]), np.uint8)
        numbers, episodes, files = self._numbers(camera, flat), self.episode_of(flat).tolist(), {}
        for i, episode in enumerate(episodes):
            files.setdefault(self._table[episode].videos[camera].file, []).append(i)
        for name, places in files.items():
            at = np.array(places)
            try:
                self._check_video(reader, camera, episodes[places[0]])
                reader.read(self.root / name, numbers[at], out, at)
            except VideoError as error:
                raise self._explained(error, flat[at][error.rows]) from error
        return out.reshape(*rows.shape, *out.shape[1:])

    def together(self, camera: str, row: Number) -> Int[np.ndarray, "n"]:
        if self.features[camera]["dtype"] == "image":
            return super().together(camera, row)
        at = np.array([row])
        episode, number = int(self.episode_of(at)[0]), int(self._numbers(camera, at)[0])
        group = self._reader().group(self.root / self._table[episode].videos[camera].file, number)
        first, end = self.episode_range(episode)
        return np.arange(max(first, int(row) - number + group[0]), min(end, int(row) - number + group[1]))

    def key_distance(self, camera: str) -> float:
        if self.features[camera]["dtype"] == "image":
            return super().key_distance(camera)
        reader, path = self._reader(), self.root / self._table[0].videos[camera].file
        return len(reader.seconds(path)) / reader.num_groups(path)

    def picture_files(self, camera: str) -> list[Path]:
        self.check_camera(camera)
        stored = self.features[camera]["dtype"] == "image"
        names = [episode.data if stored else episode.videos[camera].file for episode in self._table]
        return [self.root / name for name in dict.fromkeys(names)]

    def check_files(self, cameras: Sequence[str]) -> None:
        with layout.collected_later():
            missing = _missing(self.root, self._table, [camera for camera in cameras if camera in self.cameras])
        if missing:
            whole = sum(all(each.number not in numbers for numbers in missing.values()) for each in self._table)
            some = f", or train on the {whole} episodes that are complete: --data.skip-bad-episodes" if whole else ""
            raise FileNotFoundError(
                f"{self.root}, of {len(self._table)} episodes, {' and '.join(missing)}. Get the rest{some}."
            )

    def _bookkeeping(self, name: str) -> np.ndarray:
        kept = vars(self).setdefault("_columns", {})
        if name not in kept:
            kept[name] = self._read(name, np.arange(self.num_episodes), shape=(1,))
        return kept[name].reshape(-1)

    def _read(self, name: str, episodes: Int[np.ndarray, "k"], shape: tuple[int, ...] | None = None) -> np.ndarray:
        width: tuple[int, ...] = self.features[name]["shape"] if shape is None else shape
        wanted: dict[str, list[int]] = {}
        for place in episodes.tolist():
            wanted.setdefault(self._table[place].data, []).append(self._table[place].number)

        def read_file(file: str) -> np.ndarray:
            return self._rows.read(file, name, width, wanted[file])

        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.concatenate(list(pool.map(read_file, wanted)))

    def _reader(self) -> FrameReader:
        indices = vars(self).setdefault("_columns", {}).setdefault("frames", {})
        return self.opened().setdefault("reader", FrameReader(indices=indices))

    def _numbers(self, camera: str, rows: Rows) -> Rows:
        """Numbers of frames in their video files, by counting."""
        kept = vars(self).setdefault("_columns", {})
        if ("offset", camera) not in kept:  # of an episode's frames in the file to those in the dataset
            first = np.array([each.videos[camera].first for each in self._table])
            kept["offset", camera] = first - (self.ends - self.lengths)
        return kept["offset", camera][self.episode_of(rows)] + rows

    def _check_video(self, reader: FrameReader, camera: str, episode: int) -> None:
        """Refuses a file that has not the frames that its episodes have; says once where times are off."""
        place, length = self._table[episode].videos[camera], self._table[episode].length
        checked = self.opened().setdefault("checked", set())
        if place in checked:
            return
        seconds = reader.seconds(self.root / place.file)
        if len(seconds) != place.total and (self._strict or not _certain(place, length, seconds, self.fps)):
            raise VideoError(_miscounted(self.root / place.file, len(seconds), place.total))
        checked.add(place)
        if len(checked) > TIMES_LOOKED_AT or vars(self).setdefault("_said_times", False):
            return
        found = []
        if place.first < len(seconds) and abs(shown := seconds[place.first] - place.start) > 0.5 / self.fps:
            found.append(f"from_timestamp is {shown:+.3f} s off the frame that counting gives")
        stamps = self._read("timestamp", np.array([episode]), (1,))[:, 0].astype(np.float64)
        if np.abs(stamps - np.arange(len(stamps)) / self.fps).max() > 0.5 / self.fps:
            found.append(f"timestamps run from {stamps[0]:.3f} to {stamps[-1]:.3f} s in {len(stamps)} frames")
        rate = (len(seconds) - 1) / (seconds[-1] - seconds[0]) if len(seconds) > 1 else self.fps
        if abs(rate - self.fps) * len(seconds) / self.fps > 0.5:
            found.append(f"the video has {rate:.3f} frames per second, and the dataset {self.fps}")
        if found:
            self._said_times = True
            _log.warning(
                "%s, %s of %s: %s. Frames are counted, so pictures and rows belong together; further ones are not "
                "reported.",
                self.root,
                self.episodes[episode],
                camera,
                "; ".join(found),
            )

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
        return BadEpisode(
            f"{error} This concerns {listed(names)} of {self.root}; `without_episodes` of a DatasetConfig "
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
    everything = [episode for episodes in rows.episodes.values() for episode in episodes]
    bad: dict[int, str] = {}
    for reason, numbers in _missing(rows.root, everything, list(everything[0].videos)).items():
        bad |= {number: f"{bad[number]} and {reason}" if number in bad else reason for number in numbers}
    usable: list[str] = []
    pictures = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
    numeric = [name for name in features if name not in pictures and name not in layout.BOOKKEEPING]
    for file, episodes in rows.episodes.items():
        if not (rows.root / file).is_file():
            continue
        try:
            rows.locate(file)
            there = pq.read_schema(rows.root / file).names  # one that is promised and not used does no harm
            for name in (name for name in numeric if name in there):
                bad |= _find_uneven(rows, file, name, features[name]["shape"])
            usable.append(file)
        except (ValueError, OSError) as error:
            bad |= {episode.number: str(error) for episode in episodes}
    by_video: dict[str, list[tuple[layout.Episode, layout.Place]]] = {}
    for file in usable:
        for episode in rows.episodes[file]:
            for place in episode.videos.values():
                if episode.number not in bad:
                    by_video.setdefault(place.file, []).append((episode, place))

    def look(name: str) -> dict[int, str]:
        path, found = rows.root / name, {}
        try:
            seconds = FrameReader().seconds(path)
        except (ValueError, OSError) as error:
            return {episode.number: str(error) for episode, _ in by_video[name]}
        for episode, place in by_video[name]:
            if len(seconds) != place.total and not _certain(place, episode.length, seconds, fps):
                found[episode.number] = _miscounted(path, len(seconds), place.total)
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(look, by_video):
            bad |= found
    return bad


def _missing(root: Path, episodes: Sequence[layout.Episode], cameras: Sequence[str]) -> dict[str, set[int]]:
    """Which files are not there, in words → numbers of the episodes that are in them."""
    found = {}
    kinds = {"data files": lambda e: e.data} | {
        f"videos of {camera}": lambda e, camera=camera: e.videos[camera].file
        for camera in cameras
        if camera in episodes[0].videos
    }
    for kind, file in kinds.items():
        files: dict[str, list[int]] = {}
        for episode in episodes:
            files.setdefault(file(episode), []).append(episode.number)
        if missing := [name for name in files if not os.path.isfile(f"{root}/{name}")]:
            numbers = {number for name in missing for number in files[name]}
            words = f"lacks {len(missing)} of {len(files)} {kind}, such as {missing[0]}, of {len(numbers)} episodes"
            found[words] = numbers
    return found


def _certain(place: layout.Place, length: int, seconds: np.ndarray, fps: int | float) -> bool:
    """Whether a file with another number of frames than it should have holds an episode where count and times say."""
    return place.first + length <= len(seconds) and bool(abs(seconds[place.first] - place.start) <= 0.5 / fps)


def _miscounted(path: Path, found: int, expected: int) -> str:
    difference = f"{expected - found} are missing" if found < expected else f"{found - expected} are too many"
    return (
        f"{path} holds {found} frames; the metadata count {expected} in its episodes, so {difference}, and which frame "
        "belongs to which row is not certain. Copy the file again if it is another one where it came from; otherwise "
        "leave out the episodes that are not certain (skip_bad_episodes)."
    )


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
