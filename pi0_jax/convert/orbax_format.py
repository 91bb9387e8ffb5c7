"""Orbax's format on disk, read and written in pieces: the only file that depends on what Orbax does not publish.

Orbax's own interface takes and gives whole arrays: 6.5 GB for a full-size π0, which a conversion does in 1 GB. An item
is a folder with the tree in `_METADATA` and one zarr array per leaf, all in an OCDBT database (in older checkpoints, a
folder each). tests/convert/test_orbax_format.py compares both directions with Orbax itself, so a release that changes
the format fails there.
"""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import tensorstore as ts
import zstandard

from pi0_jax.convert import lazy
from pi0_jax.convert.files import read_json, write_json
from pi0_jax.convert.lazy import Index, LazyArray, LazyArrays, pieces, rows_per_piece
from pi0_jax.errors import UserError

_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_DICT_KEY = 2
"""`key_type` of a key of a dictionary."""
_RANGE_BYTES = 2**24
"""Bytes of a compressed chunk that are read at once."""


def open_orbax(folder: Path) -> LazyArrays:
    """Opens the arrays of an Orbax PyTree item by their paths, without `params/` at the front.

    The `value` at the end of every path of what openpi's training saves (from `nnx.State`) is left out, too.

    Raises:
        FileNotFoundError: no Orbax item there.
        UserError: an item without a `params` tree, or an array that `_METADATA` names and the store lacks.
    """
    if not (folder / "_METADATA").is_file():
        raise FileNotFoundError(f"{folder} is no whole checkpoint: it has no _METADATA.")
    metadata = read_json(folder / "_METADATA")
    paths = []
    for entry in metadata["tree_metadata"].values():
        if entry["value_metadata"].get("value_type") not in ("None", "Dict", "List", "Tuple"):
            paths.append(tuple(str(key["key"]) for key in entry["key_metadata"]))
    if not any(path[0] == "params" for path in paths):
        raise UserError(
            f"{folder} holds {sorted({path[0] for path in paths})} but no `params`; is it a train_state folder?"
        )
    paths = [path for path in paths if path[0] == "params"]
    end = -1 if all(path[-1] == "value" for path in paths) else None
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    opening = {"/".join(p[1:end]): _open_zarr(folder, ".".join(p), driver) for p in paths}  # all at once
    decoded: dict[str, Any] = {}
    return {name: _array(folder, name, store, decoded) for name, store in opening.items()}


def write_orbax(folder: Path, arrays: Mapping[str, LazyArray]) -> None:
    """Writes an Orbax PyTree item {"params": tree}, which openpi and `pi0_jax.checkpoint` read, into a new folder.

    Small arrays go to the database together, large ones piece by piece.
    """
    folder.mkdir(parents=True)
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    tree = {}
    batch, pending = ts.Transaction(), 0
    for name, array in arrays.items():
        path = ("params", *name.split("/"))
        small = array.nbytes <= lazy.PIECE_BYTES
        rows = rows_per_piece(array)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": ".".join(path) + "/"},
            "metadata": {
                "shape": list(array.shape),
                "chunks": [rows, *array.shape[1:]] if array.shape else [],
                "dtype": "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str,
                "compressor": {"id": "zstd", "level": 1},
                "fill_value": None,
                "order": "C",
                "filters": None,
            },
            "store_data_equal_to_fill_value": True,
        }
        store = ts.open(spec, create=True, context=context, transaction=batch if small else None).result()
        for start, piece in pieces(array, rows):
            view = store if start is None else store[start : start + len(piece)]
            view.write(np.ascontiguousarray(piece)).result()
        pending += array.nbytes if small else 0
        if pending > lazy.PIECE_BYTES:
            batch.commit_async().result()
            batch, pending = ts.Transaction(), 0
        tree[str(path)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(array.shape)},
        }
    batch.commit_async().result()
    _write_metadata(folder, tree)


def _write_metadata(folder: Path, tree: dict[str, Any]) -> None:
    stored = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    write_json(folder / "_METADATA", {"tree_metadata": tree, **stored, "custom_metadata": None})
    times = dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"), time.time_ns())
    empty = {"metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    write_json(folder / "_CHECKPOINT_METADATA", {"item_handlers": _HANDLER, **times, **empty})


def _open_zarr(folder: Path, key: str, driver: str) -> Any:
    """Starts to open one array, in the folder's database or in a folder of its own; returns a future."""
    if (folder / "manifest.ocdbt").is_file():
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{key}/"}
    else:
        place = {"driver": "file", "path": f"{folder}/{key}/"}
    spec = {"driver": driver, "kvstore": place, "fill_missing_data_reads": False}
    return ts.open(spec, read=True, context=ts.Context({"cache_pool": {"total_bytes_limit": 0}}))


def _array(folder: Path, name: str, opening: Any, decoded: dict[str, Any]) -> LazyArray:
    """One stored array, read by rows.

    Where all rows are one zstd chunk, as Orbax on one host writes them, they are decompressed as they are asked for, so
    that the chunk is never in memory as a whole. Of other chunks that span rows, the last one stays in `decoded`, which
    all arrays share, while its rows are read one at a time.
    """
    try:
        store = opening.result()
    except ValueError as error:
        raise UserError(f"{folder} lacks the array {name!r} that its _METADATA names: {_first_line(error)}") from error
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
    together = min(store.chunk_layout.read_chunk.shape[0], shape[0]) if shape else 1
    stream = _Stream(store, shape, dtype) if together > 1 and _is_one_zstd_chunk(store) else None

    def rows(i: Index) -> np.ndarray:
        if stream is not None:
            return stream.read(i)
        if together == 1 or not isinstance(i, int):
            decoded.clear()
            return (store if i is None else store[i]).read().result()
        start = i // together * together
        if decoded.get("of") != (name, start):
            decoded.clear()
            decoded.update({"of": (name, start), "rows": store[start : start + together].read().result()})
        return decoded["rows"][i - start, ...]

    def read(i: Index) -> np.ndarray:
        try:
            return rows(i)
        except (ValueError, OSError, zstandard.ZstdError) as error:
            raise UserError(f"{folder}: array {name!r} cannot be read: {_first_line(error)}") from error

    return LazyArray(shape, dtype, read, stacked=store.ndim > 0)


def _is_one_zstd_chunk(store: Any) -> bool:
    metadata = store.spec().to_json()["metadata"]
    whole = store.ndim > 0 and tuple(store.chunk_layout.read_chunk.shape) == tuple(store.shape)
    plain = (metadata.get("compressor") or {}).get("id") == "zstd" and metadata.get("order") == "C"
    return whole and plain and not metadata.get("filters") and not str(metadata["dtype"]).startswith(">")


class _Stream:
    """Rows of an array that is one zstd chunk, decompressed in order; going back starts again."""

    def __init__(self, store: Any, shape: tuple[int, ...], dtype: np.dtype):
        separator = store.spec().to_json()["metadata"].get("dimension_separator", ".")
        self._store, self._key = store.kvstore, separator.join("0" * len(shape))
        self._shape, self._dtype = shape, dtype
        self._size = math.prod(shape) * dtype.itemsize
        self._file: Any = None
        self._next, self._last = 0, None

    def read(self, i: Index) -> np.ndarray:
        if isinstance(i, int) and self._last is not None and self._next == i + 1:
            return self._last  # both tensors of a foreign pair are read from one of ours, one after the other
        all_rows = self._shape[0]
        first, count = (0, all_rows) if i is None else (i, 1) if isinstance(i, int) else (i.start, i.stop - i.start)
        self._last = None
        if self._file is None or self._next > first:
            source: Any = _Ranges(self._store, self._key)
            if self._size <= _RANGE_BYTES:
                source = io.BytesIO(source.read(None))  # of a stream, damage would raise another kind of error
            self._file = zstandard.ZstdDecompressor().stream_reader(source, read_size=_RANGE_BYTES)
            self._next = 0
        step = max(1, lazy.PIECE_BYTES * all_rows // max(1, self._size))
        while self._next < first:
            self._rows(min(step, first - self._next))
        found = self._rows(count)
        if isinstance(i, int):
            found = self._last = found[0, ...]  # an array, of no axes where there was one
        return found

    def _rows(self, count: int) -> np.ndarray:
        out = np.empty((count, *self._shape[1:]), self._dtype)
        view, filled = memoryview(cast(Any, out.reshape(-1).view(np.uint8))), 0
        while filled < len(view):
            got = self._file.readinto(view[filled:])
            if not got:
                raise ValueError("its data end too early")
            filled += got
        self._next += count
        if self._next == self._shape[0]:
            self._file = None
        return out


class _Ranges:
    """A value of a key-value store as a file to read from start to end."""

    def __init__(self, store: Any, key: str):
        self._store, self._key, self._at = store, key, 0

    def read(self, size: int | None) -> bytes:
        """The next bytes, none at the end. A range past the end is an error that does not tell the end: halve it."""
        while size != 0:
            end = None if size is None else self._at + size
            try:
                found = self._store.read(self._key, byte_range=slice(self._at, end)).result()
            except ValueError:
                if size is None:
                    raise
                size //= 2
                continue
            if found.state != "value":
                raise ValueError("its data are missing")
            self._at += len(found.value)
            return found.value
        return b""


def _first_line(error: Exception) -> str:
    return re.sub(r"\s*\[(tensorstore_spec|source locations)=.*", "", str(error).splitlines()[0])[:300]
