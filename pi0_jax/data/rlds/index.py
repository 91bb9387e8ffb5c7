"""Index of an RLDS dataset: the columns of numbers, the instructions, and the place of each picture in its shard.

The index of a shard is an `.npz` file, made when the dataset is first opened. tensorflow-datasets decodes the features.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pi0_jax.atomic import written
from pi0_jax.data.files import open_array_record
from pi0_jax.data.pool import run_tasks
from pi0_jax.data.source import BadEpisode
from pi0_jax.errors import UserError, require_package

FORMATS = ("tfrecord", "array_record")
INDEX_VERSION = 2
"""Version of the index files; raised when their content changes."""
PARALLEL_BYTES = 2**28
"""Datasets above this size are indexed by several processes."""
METADATA = "episode_metadata"


def build_index(
    name: str, paths: Sequence[Path], form: str, content: dict[str, Any], folder: Path, workers: int | None
) -> list[dict[str, np.ndarray]]:
    """The index of each shard; those that are missing or older than their shard are made.

    `form` is the shards' file format, one of `FORMATS`, and `content` that of `features.json`. A large dataset is
    indexed by `workers` processes; None: one per core.
    """
    features = json.dumps(content)
    targets, tasks = [], []
    for path in paths:
        status = path.stat()
        key = repr((INDEX_VERSION, path.name, status.st_size, status.st_mtime_ns, features))
        target = folder / f"{path.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        targets.append(target)
        if not target.exists():
            tasks.append((path, form, features, target))
    large = sum(path.stat().st_size for path, *_ in tasks) > PARALLEL_BYTES
    with tqdm(total=len(tasks), desc=f"indexing {name}", unit="shard", disable=not tasks) as bar:
        try:
            for _ in run_tasks(_index_shard, tasks, workers if large else 1):
                bar.update()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{folder} has no room for the index of {name}. Set PI0_CACHE to a folder with room."
            ) from error
    return [_load(target) for target in targets]


def _index_shard(path: Path, form: str, features: str, target: Path) -> None:
    """Writes the index of one shard."""
    leaves, parser = step_features(json.loads(features)), make_parser(features)
    pictures = [name for name, leaf in leaves.items() if dtype_of(leaf) == "image"]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in leaves if name not in pictures}
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in pictures}
    lengths, records, bad, reasons = [], [], [], []
    described: dict[str, list[Any]] = {name: [] for name in _metadata_features(json.loads(features))}
    for number, (offset, content) in enumerate(read_records(path, form)):
        try:
            if isinstance(content, BadEpisode):
                raise content
            try:
                example = parser.parse_example(content)
                flat = flatten(example["steps"])
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
        every = flatten(example)
        for name, value in described.items():
            value.append(_plain(every.get(name)))
    arrays: dict[str, np.ndarray] = {
        "ends": np.cumsum(lengths, dtype=np.int64),
        "records": np.array(records, np.int64),
        "bad": np.array(bad, np.int64),
        "reasons": np.array(reasons, np.str_),
    }
    arrays |= {f"metadata/{name}": np.array(values) for name, values in described.items()}
    for name, values in columns.items():
        kind = dtype_of(leaves[name])
        empty = np.zeros((0, *leaves[name].shape), np.str_ if kind == "string" else kind)
        arrays[f"column/{name}"] = np.concatenate(values) if values else empty
    if form == "tfrecord":
        arrays |= {f"span/{name}": np.array(places, np.int64).reshape(-1, 2) for name, places in spans.items()}
    with written(target) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _metadata_features(content: dict[str, Any]) -> list[str]:
    """Features of an episode as a whole that are one number or text each."""
    features = _features_module().FeaturesDict.from_json(content)
    leaves = flatten(features[METADATA], f"{METADATA}/") if METADATA in features else {}
    return [name for name, leaf in leaves.items() if tuple(leaf.shape) == () and dtype_of(leaf) != "image"]


def _plain(value: Any) -> str | float:
    """A number, or text; what an episode lacks is none."""
    value = value.item() if isinstance(value, np.ndarray) else value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else float("nan") if value is None else float(value)


def _spans(record: bytes, pictures: dict[str, np.ndarray], offset: int) -> dict[str, list[tuple[int, int]]]:
    """Offset in the file and length of each encoded picture; a record holds them unchanged."""
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


def _decoded(values: Any, leaf: Any) -> np.ndarray:
    """Values of one feature in all steps of an episode."""
    values = np.asarray(values)
    if dtype_of(leaf) == "string":
        return np.array(
            [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values.ravel()], np.str_
        )
    if values.dtype == object:
        values = np.stack([leaf.decode_example_np(value) for value in np.atleast_1d(values)])
    return values.reshape(-1, *leaf.shape).astype(leaf.np_dtype, copy=False)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@functools.lru_cache(maxsize=4)
def make_parser(features: str) -> Any:
    """A parser of episodes, by the content of `features.json`."""
    parser: Any = require_package("tensorflow_datasets.core.example_parser", "rlds", "reading RLDS")
    specification = _features_module().FeaturesDict.from_json(json.loads(features)).get_serialized_info()
    return parser.ExampleParserNp(specification)


def _features_module() -> Any:
    return require_package("tensorflow_datasets.core.features", "rlds", "reading RLDS")


def read_records(path: Path, form: str) -> Iterator[tuple[int, bytes | BadEpisode]]:
    """Byte offset (or number) and content of each record of a shard; in place of a damaged one, its error."""
    if form == "tfrecord":
        yield from read_tfrecord(path)
        return
    try:
        reader = open_array_record(path)
        count = reader.num_records()
    except Exception as error:  # the library has no narrower type
        yield 0, BadEpisode(f"cannot be opened ({error}). The shard is lost.")
        return
    for number in range(count):
        try:
            yield number, reader.read([number])[0]
        except Exception as error:
            yield number, BadEpisode(f"cannot be read ({error}).")


def read_tfrecord(path: Path) -> Iterator[tuple[int, bytes | BadEpisode]]:
    """Byte offset and content of each record of a `tfrecord` file; in place of a damaged one, its error.

    A record is a length of 8 bytes, a checksum of it, the content, and a checksum of that. After a damaged length
    nothing can be found any more, so that the file ends there.
    """
    crc: Any = require_package("google_crc32c", "rlds", "reading tfrecord files").value
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


def _masked(crc: int) -> int:
    """A checksum as tfrecord stores it: rotated, and a constant added."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def step_features(content: dict[str, Any]) -> dict[str, Any]:
    """Features of a step by path, those with one value a step; sequences within a step are left out."""
    features = _features_module().FeaturesDict.from_json(content)
    if "steps" not in features:
        raise UserError(f"features.json has {sorted(features)}; an RLDS dataset has 'steps'.")
    leaves = flatten(features["steps"].feature)
    return {
        name: leaf
        for name, leaf in sorted(leaves.items())
        if None not in tuple(leaf.shape) or dtype_of(leaf) == "image"
    }


def dtype_of(leaf: Any) -> str:
    """Name of a feature's type: "image", "string", or NumPy's."""
    module = _features_module()
    if isinstance(leaf, module.Image):
        return "image"
    dtype = np.dtype(leaf.np_dtype)
    return "string" if isinstance(leaf, module.Text) or dtype.kind in "OSU" else str(dtype)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with its keys joined by "/"."""
    flat = {}
    for key, value in tree.items():
        nested = hasattr(value, "items")
        flat |= flatten(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return flat
