"""Writes LeRobot v3.0 datasets as lerobot 0.6 writes them, without torch; `layout.py` describes the format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0_jax.atomic import partial_path, put_in_place
from pi0_jax.data.lerobot.layout import BOOKKEEPING, DATA_PATH, FILES_PER_CHUNK, VERSION, VIDEO_PATH
from pi0_jax.data.lerobot.stats import column_stats, histogram, image_stats, stored_column_stats
from pi0_jax.data.video import KEY_FRAME_EVERY, PRESET, VideoWriter
from pi0_jax.errors import UserError


class LeRobotWriter:
    """Writes a LeRobot v3.0 dataset, one episode at a time; use it in a `with` statement.

    Everything is written beside `root` and renamed into place at the end: an error leaves nothing behind.

    Video is H.264 with a key frame at every second frame and at the start of each episode. Colour is kept at full
    resolution (4:4:4), because 4:2:0 halves it: at 48 px small objects came out 20 dB worse. For large images "yuv420p"
    takes less space and plays everywhere. `features` are as in LeRobot, for each its dtype, shape and names: dtype
    "video" with shape (height, width, 3) for a camera, a numeric dtype or "bool" with shape (d,) for anything else.
    `crf` is the quality of the video, 0 (best) to 51; `data_file_mb` and `video_file_mb` are the sizes, MB, at which
    the next file is begun.

    Raises:
        FileExistsError: `root` exists and `overwrite` is not set.
        UserError: a feature that cannot be stored.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        fps: int,
        robot_type: str,
        features: dict[str, dict[str, Any]],
        *,
        overwrite: bool = False,
        pix_fmt: str = "yuv444p",
        crf: int = 4,
        data_file_mb: int | float = 100,
        video_file_mb: int | float = 200,
    ):
        self.root = Path(root)
        self.overwrite = overwrite
        self._refuse_existing()
        self.num_episodes = 0
        self.num_frames = 0
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
        self._features = _storable(features, self._cameras)
        self._histograms = {camera: np.zeros((3, 256), np.int64) for camera in self._cameras}
        self._info = {
            "codebase_version": VERSION,
            "fps": int(fps),
            "features": self._features,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": data_file_mb,
            "video_files_size_in_mb": video_file_mb,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._cameras else None,
            "robot_type": robot_type,
            "splits": {},
        }
        for camera in self._cameras:
            height, width, _ = self._features[camera]["shape"]
            self._features[camera]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": pix_fmt,
                "video.fps": int(fps),
                "video.channels": 3,
                "has_audio": False,
                "video.g": KEY_FRAME_EVERY,
                "video.crf": crf,
                "video.preset": PRESET,
                "video.fast_decode": 0,
                "video.video_backend": "pyav",
                "video.extra_options": {},
                "is_depth_map": False,
            }
        self._partial = partial_path(self.root.absolute())
        self._partial.mkdir(parents=True)
        numeric = {name: feature for name, feature in self._features.items() if name not in self._cameras}
        schema = _schema(numeric)
        self._data = _Files(self._partial, DATA_PATH, data_file_mb, lambda path: _ParquetFile(path, schema))
        self._videos = {camera: self._video_files(camera) for camera in self._cameras}

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def add_episode(
        self, frames: dict[str, np.ndarray], task: str | Sequence[str], labels: dict[str, str] | None = None
    ) -> None:
        """Appends one episode.

        `frames` are the values of each feature, `[n, *shape]`, images uint8 RGB; `task` is the instruction, or one for
        each frame; `labels` are further columns of `meta/episodes`, the same for all episodes.

        Raises:
            UserError: a feature is missing, unknown, or of the wrong shape or dtype; not finite; no frames.
        """
        length = self._check(frames, task)
        tasks = [task] * length if isinstance(task, str) else list(task)
        fps, first = self._info["fps"], self.num_frames
        index = np.arange(length)
        bookkeeping = {
            "timestamp": (index / fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(length, self.num_episodes),
            "index": first + index,
            "task_index": np.array([self._tasks.setdefault(task, len(self._tasks)) for task in tasks]),
        }
        columns = {
            name: np.asarray(frames[name], feature["dtype"]) if name in frames else bookkeeping[name][:, None]
            for name, feature in self._features.items()
            if name not in self._cameras
        }
        self._data.for_episode().write(columns)
        row: dict[str, Any] = {
            "episode_index": self.num_episodes,
            "tasks": list(dict.fromkeys(tasks)),
            "length": length,
            "data/chunk_index": self._data.chunk_index,
            "data/file_index": self._data.file_index,
            "dataset_from_index": first,
            "dataset_to_index": first + length,
            **(labels or {}),
        }
        stats = {}
        for camera, files in self._videos.items():
            video = files.for_episode()
            start = video.num_frames
            video.write(frames[camera])
            row[f"videos/{camera}/chunk_index"] = files.chunk_index
            row[f"videos/{camera}/file_index"] = files.file_index
            row[f"videos/{camera}/from_timestamp"] = start / fps
            row[f"videos/{camera}/to_timestamp"] = video.num_frames / fps
            counts, count = histogram(frames[camera])
            self._histograms[camera] += counts
            stats[camera] = image_stats(counts, count)
        stats |= {name: column_stats(column) for name, column in columns.items()}
        for name in self._features:
            row |= {f"stats/{name}/{key}": value for key, value in stats[name].items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        self._episodes.append(row)
        self.num_episodes += 1
        self.num_frames += length

    def close(self) -> None:
        """Writes what describes the whole dataset and moves the folder into place.

        Raises:
            UserError: there are no episodes.
            FileExistsError: `root` has appeared in the meantime and `overwrite` is not set.
        """
        try:
            if not self._episodes:
                raise UserError(f"no episode was added to {self.root}: a dataset holds at least one.")
            self._close_files()
            self._write_meta()
            self._refuse_existing()
            put_in_place(self._partial, self.root, replace_folder=True)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes all that was written; an existing dataset at `root` stays as it was."""
        try:
            self._close_files()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _video_files(self, camera: str) -> _Files[VideoWriter]:
        info = self._features[camera]["info"]
        size = info["video.height"], info["video.width"]
        template = VIDEO_PATH.replace("{video_key}", camera)

        def open_file(path: Path) -> VideoWriter:
            return VideoWriter(path, size, info["video.fps"], info["video.pix_fmt"], info["video.crf"])

        return _Files(self._partial, template, self._info["video_files_size_in_mb"], open_file)

    def _refuse_existing(self) -> None:
        if self.root.exists() and not self.overwrite:
            raise FileExistsError(
                f"{self.root} exists. Choose another folder, or replace it: --overwrite at the command line, "
                "overwrite=True in Python."
            )

    def _close_files(self) -> None:
        for files in (self._data, *self._videos.values()):
            files.close()

    def _check(self, frames: dict[str, np.ndarray], task: str | Sequence[str]) -> int:
        expected = [name for name in self._features if name not in BOOKKEEPING]
        if sorted(frames) != sorted(expected):
            raise UserError(f"the episode has features {sorted(frames)}; the dataset has {sorted(expected)}.")
        if not all(text.strip() for text in ([task] if isinstance(task, str) else task)):
            raise UserError("the episode's task is empty; it is the instruction that the policy will read.")
        lengths = {name: len(values) for name, values in frames.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise UserError(f"features of an episode need one common length of at least 1; they have {lengths}.")
        if not isinstance(task, str) and len(task) != len(frames[expected[0]]):
            raise UserError(f"the episode has {len(task)} tasks and {len(frames[expected[0]])} frames.")
        for name, values in frames.items():
            shape = tuple(self._features[name]["shape"])
            dtype = np.dtype(np.uint8 if name in self._cameras else self._features[name]["dtype"])
            castable = values.dtype == dtype or (name not in self._cameras and np.can_cast(values, dtype, "same_kind"))
            if values.shape[1:] != shape or not castable:
                raise UserError(
                    f"feature {name!r} came as {values.dtype}{list(values.shape)}; expected {dtype}{['n', *shape]}."
                )
            if values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
                bad = np.flatnonzero(~finite.all(1))[:5].tolist()
                raise UserError(f"feature {name!r} holds NaN or infinity in frames {bad}.")
        return len(frames[expected[0]])

    def _write_meta(self) -> None:
        files = sorted(self._partial.glob("data/*/*.parquet"))
        stats = {}
        for name, feature in self._features.items():
            if name in self._cameras:
                count = sum(row[f"stats/{name}/count"][0] for row in self._episodes)
                stats[name] = image_stats(self._histograms[name], count)
            else:
                stats[name] = stored_column_stats(files, name, tuple(feature["shape"]))
        write_meta(self._partial, self._info, self._episodes, list(self._tasks), stats)


def write_meta(
    root: Path, info: dict[str, Any], episodes: list[dict[str, Any]], tasks: list[str], stats: dict[str, Any]
) -> None:
    """Writes the folder `meta`; `tasks` are the instructions by task index, and `info` gets its totals here."""
    meta = root / "meta"
    (meta / "episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), meta / "episodes/chunk-000/file-000.parquet")
    write_texts(meta / "tasks.parquet", "task", tasks)
    (meta / "stats.json").write_text(json.dumps(stats, indent=4))
    count, frames = len(episodes), episodes[-1]["dataset_to_index"]
    totals = {"total_episodes": count, "total_frames": frames, "total_tasks": len(tasks)}
    content = info | totals | {"splits": {"train": f"0:{count}"}}
    (meta / "info.json").write_text(json.dumps(content, indent=4, ensure_ascii=False))


def _pandas_column(field: str | None, name: str | None, pandas: str, numpy: str, metadata: Any = None) -> dict:
    types = {"pandas_type": pandas, "numpy_type": numpy, "metadata": metadata}
    return {"name": name, "field_name": field, **types}


def write_texts(path: Path, name: str, texts: Sequence[str]) -> None:
    """Writes the instructions ("task") or subtasks ("subtask") of a dataset by their index, as lerobot reads them."""
    table = pa.table({f"{name}_index": pa.array(range(len(texts)), pa.int64()), name: texts})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(_pandas_index(name))}), path)


def _pandas_index(name: str) -> dict[str, Any]:
    """What pandas stores in a parquet file whose index is that column, which is how lerobot reads it."""
    return {
        "index_columns": [name],
        "column_indexes": [_pandas_column(None, None, "unicode", "object", {"encoding": "UTF-8"})],
        "columns": [
            _pandas_column(f"{name}_index", f"{name}_index", "int64", "int64"),
            _pandas_column(name, name, "unicode", "object"),
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }


class _ParquetFile:
    """A parquet file with one row group per episode."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._schema = schema
        self._file = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, schema)

    @property
    def num_bytes(self) -> int:
        return self._file.tell()

    def write(self, columns: dict[str, np.ndarray]) -> None:
        arrays = [
            pa.array(column[:, 0])
            if column.shape[1] == 1
            else pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), type=self._schema.field(name).type)
            for name, column in columns.items()
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
        self._file.close()


File = TypeVar("File", VideoWriter, _ParquetFile)


class _Files(Generic[File]):
    """Numbered files of bounded size. The next is begun when an episode as large as the last would not fit."""

    def __init__(self, root: Path, template: str, limit_mb: int | float, open_file: Callable[[Path], File]):
        self._root, self._template, self._limit, self._open = root, template, limit_mb * 1024**2, open_file
        self._current: File | None = None
        self._number = -1
        self._before = 0

    @property
    def chunk_index(self) -> int:
        return self._number // FILES_PER_CHUNK

    @property
    def file_index(self) -> int:
        return self._number % FILES_PER_CHUNK

    def for_episode(self) -> File:
        """The file that the coming episode goes to."""
        if self._current is not None:
            size = self._current.num_bytes
            if size + (size - self._before) > self._limit:
                self.close()
            self._before = size
        if self._current is None:
            self._number += 1
            self._before = 0
            path = self._root / self._template.format(chunk_index=self.chunk_index, file_index=self.file_index)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._current = self._open(path)
        return self._current

    def close(self) -> None:
        if self._current is not None:
            current, self._current = self._current, None
            current.close()


def _storable(features: dict[str, dict[str, Any]], cameras: list[str]) -> dict[str, dict[str, Any]]:
    """`features` in LeRobot's form, followed by the bookkeeping columns."""
    result = {}
    for name, feature in features.items():
        shape, dtype = tuple(int(size) for size in feature["shape"]), feature["dtype"]
        names = feature.get("names")
        if name in cameras:
            names = names or ["height", "width", "channels"]
            if len(shape) != 3 or shape[2] != 3:
                raise UserError(f"camera {name!r} has shape {shape}; expected (height, width, 3).")
            if shape[0] % 2 or shape[1] % 2:
                raise UserError(f"camera {name!r} has shape {shape}; video needs an even height and width.")
        else:
            try:
                kind = np.dtype(dtype).kind
            except TypeError:
                kind = None
            if kind not in ("f", "i", "u", "b") or len(shape) != 1 or name in BOOKKEEPING:
                raise UserError(
                    f"feature {name!r} has dtype {dtype!r} and shape {shape}; expected 'video' and (height, width, 3), "
                    f"or a number type and (d,). The names {list(BOOKKEEPING)} are added by the writer."
                )
        result[name] = {"dtype": dtype, "shape": shape, "names": names}
    return result | {name: dict(feature) for name, feature in BOOKKEEPING.items()}


def _schema(features: dict[str, dict[str, Any]]) -> pa.Schema:
    """Arrow types of the data files, and the description of them that the `datasets` library looks for."""
    fields, described = [], {}
    for name, feature in features.items():
        value = {"dtype": feature["dtype"], "_type": "Value"}
        element, size = pa.from_numpy_dtype(np.dtype(feature["dtype"])), feature["shape"][0]
        if size == 1:
            fields.append(pa.field(name, element))
            described[name] = value
        else:
            fields.append(pa.field(name, pa.list_(pa.field("element", element), size)))
            described[name] = {"feature": value, "length": size, "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})
