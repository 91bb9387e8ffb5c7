"""Reads RLDS datasets, such as DROID's and Open X-Embodiment's, as tensorflow-datasets writes them; no tensorflow.

Such a dataset is a folder `<name>/<version>/` with `features.json`, `dataset_info.json` and shards; a record of a shard
is a whole episode, its pictures as JPEG or PNG. tensorflow-datasets decodes the features (the extra `rlds`); it cannot
open `tfrecord` files without tensorflow, so their frames, a length and two checksums each, are taken apart here.

The first use reads every shard once and keeps an index beside it: the columns of numbers, the instructions, and where
each picture is. After that any frame of a `tfrecord` shard is one read of its own bytes, and a frame of an
`array_record` shard one read of its episode, which such files compress. So both have random access, and one stream of
indices serves them like any other dataset. Loaders that must not jump about a disk take `shuffle="shards"`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from pi0_jax.atomic import written
from pi0_jax.data.source import BadEpisode, Rows, Source, cache_folder

INDEX_VERSION = 1
"""Of the index files; raised when what they hold changes."""
SHARDS_OPEN = 64
EPISODES_KEPT = 16
"""Parsed episodes of compressed shards that each process keeps."""
PARALLEL_BYTES = 2**28
"""Datasets above this size are indexed by several processes."""
FORMATS = ("tfrecord", "array_record")
METADATA = "episode_metadata/file_path"

_log = logging.getLogger(__name__)


class RldsDataset(Source):
    """Reads an RLDS dataset.

    Features are named by their path among the steps, such as "observation/image" or "action".

    Args:
        root: folder of one version, or of the dataset, whose newest version is taken.
        fps: frames per second, which the format does not store.
        split: name of the split.
        task: feature with the instruction.
        only: regular expression that an episode's `episode_metadata/file_path` has to contain.
        cache: folder for the index; by default `.cache` in `root`, or one in the temporary folder.
        skip_bad_episodes: leave out records that cannot be read, and log them.
        workers: processes that index a large dataset; None: one a core.

    Raises:
        FileNotFoundError: the folder, a file of it, or a shard is missing.
        ValueError: no RLDS dataset, a feature is missing, or a record is damaged; the `rlds` extra is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        fps: float,
        *,
        split: str = "train",
        task: str = "language_instruction",
        only: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        skip_bad_episodes: bool = False,
        workers: int | None = None,
    ):
        self.root, self.fps = _version_folder(Path(root)), fps
        self.format, self._paths, counts = _shards(self.root, split)
        self._json = _read_json(self.root / "features.json")
        leaves = _step_features(self._json)
        self.features = {
            name: {"dtype": _dtype(leaf), "shape": tuple(leaf.shape), "names": None} for name, leaf in leaves.items()
        }
        if task not in self.features:
            texts = [name for name, feature in self.features.items() if feature["dtype"] == "string"]
            raise ValueError(
                f"{self.root} has no instruction {task!r}; its text is {texts}. Set `task` of the dataset."
            )
        folder = cache_folder(self.root, None if cache is None else Path(cache))
        self._index = [_load(path) for path in self._build(folder, workers)]
        self.skipped = {}
        for path, shard, count in zip(self._paths, self._index, counts, strict=True):
            bad = dict(zip(shard["bad"].tolist(), shard["reasons"].tolist(), strict=True))
            found = len(shard["records"]) + len(bad)
            lost = f"is missing: the file holds {found} of {count} records."
            for number, reason in (bad | dict.fromkeys(range(found, count), lost)).items():
                message = f"{path}: record {number}, which is episode {number} of this shard, {reason}"
                if not skip_bad_episodes:
                    raise BadEpisode(f"{message} Copy the shard again, or pass skip_bad_episodes.")
                self.skipped[f"episode {number} of {path.name}"] = message
        self._choose(only)
        texts = np.concatenate([shard[f"column/{task}"] for shard in self._index])[self._rows]
        found, self._task_index = _unique(texts)
        self.tasks = found.tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_steps"}

    def read(self, name: str, first: int, end: int) -> np.ndarray:
        self.check_column(name)
        start = self.episode_range(first)[0] if first < self.num_episodes else self.num_frames
        rows = self._rows[start : int(self.ends[end - 1]) if end else 0]
        shards = self._shard_of(rows)
        parts = [
            self._index[s][f"column/{name}"][rows[shards == s] - self._starts[s]] for s in np.unique(shards).tolist()
        ]
        return np.concatenate(parts) if parts else np.zeros((0, *self.features[name]["shape"]))

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        return self._task_index

    @property
    def shard_ends(self) -> Int[np.ndarray, "s"]:
        return np.unique([*np.searchsorted(self._rows, self._starts[1:]), len(self._rows)])

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "n h w 3"]:
        self.check_camera(camera)
        rows = np.asarray(rows)
        at = self._rows[rows.ravel()]
        shards = self._shard_of(at)
        within = at - self._starts[shards]
        pictures: list[Any] = [None] * at.size
        for i in np.lexsort((within, shards)).tolist():
            pictures[i] = self._picture(camera, int(shards[i]), int(within[i]))
        return np.stack(pictures).reshape(*rows.shape, *pictures[0].shape)

    def picture_files(self, camera: str) -> list[Path]:
        self.check_camera(camera)
        return list(self._paths)

    def _picture(self, camera: str, shard: int, step: int) -> np.ndarray:
        index, path = self._index[shard], self._paths[shard]
        episode = int(np.searchsorted(index["ends"], step, side="right"))
        if "_steps" not in self.__dict__:
            self._steps = _step_features(self._json)
        try:
            if self.format == "tfrecord":
                offset, length = index[f"span/{camera}"][step].tolist()
                encoded = os.pread(self._open(path).fileno(), length, offset)
            else:
                begin = int(index["ends"][episode - 1]) if episode else 0
                encoded = self._parsed_episode(path, int(index["records"][episode]))[camera][step - begin]
            return self._steps[camera].decode_example_np(encoded)
        except (ValueError, OSError) as error:
            raise BadEpisode(
                f"{path}: a picture of {camera!r} in record {int(index['records'][episode])} cannot be decoded: {error}"
            ) from error

    def _parsed_episode(self, path: Path, number: int) -> dict[str, np.ndarray]:
        kept = self.opened().setdefault("episodes", {})
        if (path, number) not in kept:
            if len(kept) >= EPISODES_KEPT:
                kept.pop(next(iter(kept)))
            flat = _flat(_parser(json.dumps(self._json)).parse_example(self._open(path).read([number])[0])["steps"])
            kept[path, number] = {camera: np.atleast_1d(flat[camera]) for camera in self.cameras}
        return kept[path, number]

    def _open(self, path: Path) -> Any:
        kept = self.opened().setdefault("shards", {})
        if path not in kept:
            if len(kept) >= SHARDS_OPEN:
                kept.pop(next(iter(kept))).close()
            kept[path] = path.open("rb", buffering=0) if self.format == "tfrecord" else _open_array_record(path)
        return kept[path]

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _choose(self, only: str | None) -> None:
        """Episodes by `only`: which rows of the index are frames of the dataset."""
        lengths = [np.diff(shard["ends"], prepend=0) for shard in self._index]
        self._starts = np.cumsum([0, *(int(part.sum()) for part in lengths)])[:-1]
        every = np.concatenate(lengths)
        files = np.concatenate([shard["file_path"] for shard in self._index])
        names = [
            f"episode {number} of {path.name}"
            for path, shard in zip(self._paths, self._index, strict=True)
            for number in shard["records"].tolist()
        ]
        keep = np.array([only is None or re.search(only, str(file)) is not None for file in files], bool)
        keep &= every > 0
        if not keep.any():
            raise ValueError(
                f"{self.root} has no episode{'' if only is None else f' whose file_path contains {only!r}'}; it has "
                f"{len(every)} in all."
            )
        self._rows = np.flatnonzero(np.repeat(keep, every))
        self.ends = np.cumsum(every[keep])
        self.episodes = [name for name, kept in zip(names, keep, strict=True) if kept]

    def _build(self, folder: Path, workers: int | None) -> list[Path]:
        """Index files of all shards; those that are missing or older than their shard are made."""
        content = json.dumps(self._json)
        targets, missing = [], []
        for path in self._paths:
            status = path.stat()
            key = repr((INDEX_VERSION, path.name, status.st_size, status.st_mtime_ns, content))
            target = folder / f"{path.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
            targets.append(target)
            if not target.exists():
                missing.append((path, target))
        work = [functools.partial(_index_shard, path, self.format, content, target) for path, target in missing]
        size = sum(path.stat().st_size for path, _ in missing)
        workers = min(workers or os.cpu_count() or 1, len(work)) if size > PARALLEL_BYTES else 1
        with tqdm(total=len(work), desc=f"indexing {self.root.parent.name}", unit="shard", disable=not work) as bar:
            for _ in _each(work, workers):
                bar.update()
        return targets


def read_records(path: Path) -> Iterator[tuple[int, bytes | BadEpisode]]:
    """Byte offset and content of each record of a `tfrecord` file; in place of a damaged one, what is wrong with it.

    A record is a length of 8 bytes, a checksum of it, the content, and a checksum of that. After a damaged length
    nothing can be found any more, so that the file ends there.
    """
    crc = _crc32c()
    with path.open("rb") as file:
        while head := file.read(12):
            if len(head) < 12 or struct.unpack("<I", head[8:])[0] != _masked(crc(head[:8])):
                yield file.tell(), BadEpisode("has a damaged length: its checksum (CRC) is wrong. The rest is lost.")
                return
            (length,) = struct.unpack("<Q", head[:8])
            offset = file.tell()
            content, tail = file.read(length), file.read(4)
            if len(content) < length or len(tail) < 4:
                yield offset, BadEpisode(f"is cut short: {len(content)} of {length} bytes are there.")
                return
            if struct.unpack("<I", tail)[0] != _masked(crc(content)):
                yield offset, BadEpisode("is damaged: its checksum (CRC) is wrong.")
            else:
                yield offset, content


def _index_shard(path: Path, form: str, features: str, target: Path) -> None:
    """Writes the index of one shard."""
    leaves, parser = _step_features(json.loads(features)), _parser(features)
    pictures = [name for name, leaf in leaves.items() if _dtype(leaf) == "image"]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in leaves if name not in pictures}
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in pictures}
    lengths, records, files, bad, reasons = [], [], [], [], []
    for number, (offset, content) in enumerate(_records(path, form)):
        try:
            if isinstance(content, BadEpisode):
                raise content
            try:
                example = parser.parse_example(content)
                flat = _flat(example["steps"])
                values = {name: _decoded(flat[name], leaves[name]) for name in columns}
            except (KeyError, TypeError, ValueError) as error:  # protobuf's DecodeError is a ValueError or its own
                raise BadEpisode(f"does not match features.json: {error}.") from error
            counts = {name: len(v) for name, v in values.items()} | {c: len(np.atleast_1d(flat[c])) for c in pictures}
            if len(set(counts.values())) != 1:
                raise BadEpisode(f"has columns of different lengths: {counts}.")
            found = _spans(content, {c: np.atleast_1d(flat[c]) for c in pictures}, offset)
        except BadEpisode as error:
            bad.append(number)
            reasons.append(str(error))
            continue
        for name, value in values.items():
            columns[name].append(value)
        for name, value in found.items():
            spans[name] += value
        lengths.append(next(iter(counts.values())))
        records.append(number)
        file = _flat(example).get(METADATA, b"")
        files.append(file.item() if isinstance(file, np.ndarray) else file)
    arrays: dict[str, np.ndarray] = {
        "ends": np.cumsum(lengths, dtype=np.int64),
        "records": np.array(records, np.int64),
        "file_path": np.array([f.decode(errors="replace") if isinstance(f, bytes) else str(f) for f in files], np.str_),
        "bad": np.array(bad, np.int64),
        "reasons": np.array(reasons, np.str_),
    }
    for name, parts in columns.items():
        kind = _dtype(leaves[name])
        empty = np.zeros((0, *leaves[name].shape), np.str_ if kind == "string" else kind)
        arrays[f"column/{name}"] = np.concatenate(parts) if parts else empty
    if form == "tfrecord":
        arrays |= {f"span/{name}": np.array(parts, np.int64).reshape(-1, 2) for name, parts in spans.items()}
    with written(target) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _spans(record: bytes, pictures: dict[str, np.ndarray], offset: int) -> dict[str, list[tuple[int, int]]]:
    """Where each encoded picture lies in the file, and its length: they are in the record as they are."""
    found = {}
    for name, encoded in pictures.items():
        spans, position = [], 0
        for picture in encoded.tolist():
            position = record.find(picture, position)
            if position < 0:  # a picture that occurs earlier too
                position = record.index(picture)
            spans.append((offset + position, len(picture)))
            position += len(picture)
        found[name] = spans
    return found


def _records(path: Path, form: str) -> Iterator[tuple[int, bytes | BadEpisode]]:
    if form == "tfrecord":
        yield from read_records(path)
        return
    try:
        reader = _open_array_record(path)
        count = reader.num_records()
    except Exception as error:  # the library has no narrower type
        yield 0, BadEpisode(f"cannot be opened ({error}). The shard is lost.")
        return
    for number in range(count):
        try:
            yield number, reader.read([number])[0]
        except Exception as error:
            yield number, BadEpisode(f"cannot be read ({error}).")


def _decoded(values: Any, leaf: Any) -> np.ndarray:
    """Values of one feature in all steps of an episode."""
    values = np.asarray(values)
    if _dtype(leaf) == "string":
        return np.array(
            [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values.ravel()], np.str_
        )
    if values.dtype == object:
        values = np.stack([leaf.decode_example_np(value) for value in np.atleast_1d(values)])
    return values.reshape(-1, *leaf.shape).astype(leaf.np_dtype, copy=False)


def _unique(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different texts in the order of their first use, and the number of each among them."""
    found, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return found[order], rank[inverse]


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _each(work: list, workers: int) -> Iterator[None]:
    if workers <= 1:
        for task in work:
            yield task()
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(task) for task in work]):
            yield future.result()


def _version_folder(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    if (root / "features.json").is_file():
        return root
    versions = [path.parent for path in root.glob("*/features.json")]
    if not versions:
        raise FileNotFoundError(
            f"neither {root} nor a folder in it has a features.json; expected an RLDS dataset, <name>/<version>."
        )
    return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def _shards(root: Path, split: str) -> tuple[str, list[Path], list[int]]:
    """File format and shards of a split, and how many records each has."""
    info = _read_json(root / "dataset_info.json")
    form = info.get("fileFormat", "tfrecord")
    if form not in FORMATS:
        raise ValueError(f"{root} is of format {form!r}; {' and '.join(FORMATS)} can be read.")
    splits = {entry["name"]: entry for entry in info["splits"]}
    if split not in splits:
        raise ValueError(f"{root} has no split {split!r}; it has {sorted(splits)}.")
    lengths = [int(length) for length in splits[split]["shardLengths"]]
    count = len(lengths)
    names = [f"{info['name']}-{split}.{form}-{number:05d}-of-{count:05d}" for number in range(count)]
    if missing := [name for name in names if not (root / name).is_file()]:
        raise FileNotFoundError(
            f"{root} lacks {missing[:5]}, {len(missing)} of {count} shards. Copy the dataset again."
        )
    return form, [root / name for name in names], lengths


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; an RLDS dataset has one. Copy the dataset again.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy the dataset again.") from error


def _tfds() -> tuple[Any, Any]:
    """The parts of tensorflow-datasets that work without tensorflow."""
    try:
        from tensorflow_datasets.core import example_parser, features
    except ImportError as error:
        raise ValueError("reading RLDS needs tensorflow-datasets (no tensorflow): pip install pi0_jax[rlds]") from error
    return example_parser, features


def _crc32c() -> Any:
    try:
        import google_crc32c
    except ImportError as error:
        raise ValueError("reading tfrecord needs google-crc32c: pip install pi0_jax[rlds]") from error
    return google_crc32c.value


def _masked(crc: int) -> int:
    """How tfrecord stores a checksum: rotated, and a constant added."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _open_array_record(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def _parser(features: str) -> Any:
    return _cached_parser(features)


@functools.lru_cache(maxsize=4)
def _cached_parser(features: str) -> Any:
    example_parser, module = _tfds()
    return example_parser.ExampleParserNp(module.FeaturesDict.from_json(json.loads(features)).get_serialized_info())


def _step_features(content: dict[str, Any]) -> dict[str, Any]:
    """Features of a step by path, those with one value a step; sequences within a step are left out."""
    _, module = _tfds()
    features = module.FeaturesDict.from_json(content)
    if "steps" not in features:
        raise ValueError(f"features.json has {sorted(features)}; an RLDS dataset has 'steps'.")
    leaves = _flat(features["steps"].feature)
    return {
        name: leaf for name, leaf in sorted(leaves.items()) if None not in tuple(leaf.shape) or _dtype(leaf) == "image"
    }


def _dtype(leaf: Any) -> str:
    _, module = _tfds()
    if isinstance(leaf, module.Image):
        return "image"
    dtype = np.dtype(leaf.np_dtype)
    return "string" if isinstance(leaf, module.Text) or dtype.kind in "OSU" else str(dtype)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with its keys joined by "/"."""
    flat = {}
    for key, value in tree.items():
        nested = hasattr(value, "items")
        flat |= _flat(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return flat
