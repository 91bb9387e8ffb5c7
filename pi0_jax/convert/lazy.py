"""Tensors on disk, read and written piece by piece: Orbax folders, safetensors, npz. No torch.

A `Tensor` knows its shape and reads itself when asked, all of it or some entries of its first axis. A conversion is a
dictionary of tensors whose `read` rearranges what another `read` returns, so that no more than a few layers are in
memory at a time, whatever the size of the model.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from pi0_jax.convert.files import read_json, write_json

PIECE_BYTES = 2**26
"""Size of a storage chunk, and of a piece of a tensor, where entries of the first axis are smaller than that."""

Index = int | slice | None
"""Of the first axis: one entry, consecutive ones (start and stop inside the tensor), or all."""


class Tensor(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    """Reads everything, one entry along the first axis, or some of them."""
    stacked: bool = False
    """Whether entries are read without reading the rest."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Tensors = dict[str, Tensor]
"""Name, or path joined by "/", to tensor."""


def in_memory(array: np.ndarray) -> Tensor:
    """An array as a tensor."""
    return Tensor(array.shape, array.dtype, lambda i: array if i is None else array[i], stacked=array.ndim > 0)


def entry_by_entry(shape: tuple[int, ...], dtype: np.dtype, entry: Callable[[int], np.ndarray]) -> Tensor:
    """A tensor of which each entry of the first axis is read by itself."""

    def read(i: Index) -> np.ndarray:
        if isinstance(i, int):
            return entry(i)
        numbers = range(shape[0]) if i is None else range(i.start, i.stop)
        out = np.empty((len(numbers), *shape[1:]), dtype)
        for place, number in enumerate(numbers):
            out[place] = entry(number)
        return out

    return Tensor(shape, dtype, read, stacked=True)


def pieces(tensor: Tensor, rows: int = 1) -> Iterator[tuple[int | None, np.ndarray]]:
    """The tensor in order: some rows of a stacked one at a time with the index of the first, or (None, everything)."""
    if not tensor.stacked or not tensor.shape:
        yield None, tensor.read(None)
    elif rows >= tensor.shape[0]:
        yield 0, tensor.read(None)
    else:
        for start in range(0, tensor.shape[0], rows):
            stop = min(start + rows, tensor.shape[0])
            yield start, tensor.read(start)[None] if rows == 1 else tensor.read(slice(start, stop))


def rows_per_piece(tensor: Tensor) -> int:
    """How many entries of the first axis make a piece of `PIECE_BYTES` (at least one, at most all)."""
    if not tensor.shape:
        return 1
    return min(max(1, PIECE_BYTES * tensor.shape[0] // max(1, tensor.nbytes)), max(1, tensor.shape[0]))


def read_all(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Reads tensors into memory."""
    return {name: np.asarray(tensor.read(None)) for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------------- safetensors

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_safetensors(path: Path) -> Tensors:
    """Opens a `.safetensors` file: a JSON header with dtype, shape and offsets, then the bytes.

    Raises:
        ValueError: the file is damaged or cut short, or a tensor has a dtype that numpy lacks.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length + 8 > size:
            raise ValueError(f"{path} is no safetensors file, or is cut short: {size} bytes.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON ({error}).") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}, and only {', '.join(_DTYPES)} are read. "
                "Store it in one of those (quantised weights cannot be converted)."
            )
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or length + 8 + end > size:
            raise ValueError(f"{path} is damaged or cut short at tensor {name!r}: it needs {end + length + 8} bytes.")
        tensors[name] = _raw(path, 8 + length + begin, shape, dtype)
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    """Writes a `.safetensors` file, one piece of a tensor at a time, in the given order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for _, piece in pieces(tensor, rows_per_piece(tensor)):
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def _raw(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """A tensor that lies uncompressed in a file, in C order."""
    inner = math.prod(shape[1:])

    def read(i: Index) -> np.ndarray:
        if i is None:
            start, count, out = 0, math.prod(shape), shape
        elif isinstance(i, int):
            start, count, out = i * inner, inner, shape[1:]
        else:
            start, count, out = i.start * inner, (i.stop - i.start) * inner, (i.stop - i.start, *shape[1:])
        array = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=offset + start * dtype.itemsize)
        return array.view(dtype).reshape(out)

    return Tensor(shape, dtype, read, stacked=len(shape) > 0)


# ----------------------------------------------------------------------------------------------------------------- npz


def open_npz(path: Path) -> Tensors:
    """Opens an `.npz`. Arrays of numpy's two-byte void type are bfloat16, which numpy forgets when it saves.

    Raises:
        ValueError: not an npz, or an array of Python objects in it.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no npz file: {error}.") from error
    tensors = {}
    with archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                reader = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = reader(file)
                head = file.tell()
            name = member.filename.removesuffix(".npy")
            if dtype == np.dtype("V2"):
                dtype = np.dtype(ml_dtypes.bfloat16)
            if dtype.hasobject:
                raise ValueError(f"{path}: {name!r} holds Python objects, which are not read: they can run code.")
            if member.compress_type == zipfile.ZIP_STORED and not fortran:
                tensors[name] = _raw(path, _data_offset(path, member) + head, shape, dtype)
            else:
                tensors[name] = Tensor(shape, dtype, _npz_reader(path, name, dtype))
    return tensors


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: after its local header, whose lengths may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + name + extra


def _npz_reader(path: Path, name: str, dtype: np.dtype) -> Callable[[Index], np.ndarray]:
    def read(i: Index) -> np.ndarray:
        with np.load(path, allow_pickle=False) as file:
            array = np.ascontiguousarray(file[name]).view(dtype)
        return array if i is None else array[i]

    return read


# --------------------------------------------------------------------------------------------------------------- Orbax


def open_orbax(folder: Path) -> Tensors:
    """Opens the arrays of an Orbax PyTree item, each by its path without `params/` at the front and `value` at the end.

    `value` ends every path of what openpi's training saves (from `nnx.State`).

    Raises:
        FileNotFoundError: no Orbax item there.
        ValueError: an item without a `params` tree, or an array that `_METADATA` names and the store lacks.
    """
    if not (folder / "_METADATA").is_file():
        raise FileNotFoundError(f"{folder} is no whole checkpoint: it has no _METADATA.")
    metadata = read_json(folder / "_METADATA")
    paths = []
    for entry in metadata["tree_metadata"].values():
        if entry["value_metadata"].get("value_type") not in ("None", "Dict", "List", "Tuple"):
            paths.append(tuple(str(key["key"]) for key in entry["key_metadata"]))
    if not any(path[0] == "params" for path in paths):
        raise ValueError(
            f"{folder} holds {sorted({path[0] for path in paths})} but no `params`; is it a train_state folder?"
        )
    trailing = all(path[-1] == "value" for path in paths if path[0] == "params")
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    opened = {}
    for path in paths:
        if path[0] == "params":
            name = "/".join(path[1:-1] if trailing else path[1:])
            reopen = functools.partial(_open_zarr, folder, ".".join(path), driver)
            opened[name] = reopen(), reopen
    slot: dict[str, Any] = {}
    return {name: _zarr_tensor(folder, name, opening, reopen, slot) for name, (opening, reopen) in opened.items()}


def _store(folder: Path, name: str) -> dict[str, Any]:
    """The key-value store of one array: in the folder's OCDBT database, or a folder of its own in older checkpoints."""
    if (folder / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
    return {"driver": "file", "path": f"{folder}/{name}/"}


def _open_zarr(folder: Path, key: str, driver: str, cache_bytes: int = 0):
    """Starts to open one array; returns a future."""
    import tensorstore as ts

    spec = {"driver": driver, "kvstore": _store(folder, key), "fill_missing_data_reads": False}
    return ts.open(spec, read=True, context=ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}))


def _zarr_tensor(folder: Path, name: str, opening, reopen: Callable[[int], Any], slot: dict[str, Any]) -> Tensor:
    """One array, by rows.

    Where all rows are one zstd chunk, as Orbax on one host writes them, they are unpacked in order as they are asked
    for, and neither the packed nor the unpacked chunk is ever whole in memory. Other chunks that span rows are decoded
    once and stay in a cache while their rows are read one at a time.
    """
    try:
        store = opening.result()
    except ValueError as error:
        raise ValueError(f"{folder} lacks the array {name!r} that its _METADATA names: {_first_line(error)}") from error
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
    together = min(store.chunk_layout.read_chunk.shape[0], shape[0]) if shape else 1
    unpack = None if together == 1 else _unpacker(store)

    def fetch(view) -> np.ndarray:
        try:
            return view.read().result()
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder}: array {name!r} cannot be read: {_first_line(error)}") from error

    def read(i: Index) -> np.ndarray:
        if together == 1 or not isinstance(i, int):
            slot.clear()
            return fetch(store if i is None else store[i])
        if slot.get("name") != name:
            slot.clear()
            slot.update(name=name, store=reopen(2 * together * math.prod(shape[1:]) * dtype.itemsize).result())
        return fetch(slot["store"][i])

    def read_unpacking(i: Index) -> np.ndarray:
        assert unpack is not None
        slot.clear()
        try:
            return unpack(i)
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder}: array {name!r} cannot be read: {_first_line(error)}") from error

    return Tensor(shape, dtype, read_unpacking if unpack else read, stacked=store.ndim > 0)


def _unpacker(store) -> Callable[[Index], np.ndarray] | None:
    """Reads rows of an array that is one zstd chunk; None where it is stored in another way."""
    metadata = store.spec().to_json()["metadata"]
    whole = store.ndim > 0 and tuple(store.chunk_layout.read_chunk.shape) == tuple(store.shape)
    plain = (metadata.get("compressor") or {}).get("id") == "zstd" and metadata.get("order") == "C"
    if not whole or not plain or metadata.get("filters") or str(metadata["dtype"]).startswith(">"):
        return None
    key = metadata.get("dimension_separator", ".").join("0" * store.ndim)
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
    size = math.prod(shape) * dtype.itemsize
    step = max(1, PIECE_BYTES * shape[0] // max(1, size))
    state: dict[str, Any] = {"next": 0, "stream": None, "row": None}

    def rows(count: int) -> np.ndarray:
        """The next rows of the stream."""
        out = np.empty((count, *shape[1:]), dtype)
        view, filled = memoryview(cast(Any, out.reshape(-1).view(np.uint8))), 0
        while filled < len(view):
            got = state["stream"].readinto(view[filled:])
            if not got:
                raise ValueError("its data end too early")
            filled += got
        state["next"] += count
        if state["next"] == shape[0]:
            state["stream"] = None
        return out

    def start() -> None:
        import zstandard

        # A stream of bytes that do not unpack raises an error of its own kind.
        source: Any = _Ranges(store.kvstore, key)
        source = io.BytesIO(source.read(None)) if size <= _RANGE_BYTES else source
        state.update(next=0, stream=zstandard.ZstdDecompressor().stream_reader(source, read_size=_RANGE_BYTES))

    def read(i: Index) -> np.ndarray:
        import zstandard

        if isinstance(i, int) and state["row"] is not None and state["next"] == i + 1:
            return state["row"]  # pairs of their tensors are read from one of ours, one after the other
        first, count = (0, shape[0]) if i is None else (i, 1) if isinstance(i, int) else (i.start, i.stop - i.start)
        state["row"] = None
        try:
            if state["stream"] is None or state["next"] > first:
                start()
            while state["next"] < first:
                rows(min(step, first - state["next"]))
            found = rows(count)
        except zstandard.ZstdError as error:
            raise ValueError(f"its data do not unpack: {error}") from error
        if isinstance(i, int):
            found = state["row"] = found[0]
        return found

    return read


_RANGE_BYTES = 2**24
"""Of a packed chunk, read at once."""


class _Ranges:
    """A value of a key-value store as a file to read from start to end."""

    def __init__(self, store, key: str):
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


def write_orbax(folder: Path, tensors: Mapping[str, Tensor], whole: bool = False):
    """Writes an Orbax PyTree item {"params": tree}, which openpi and `pi0_jax.checkpoint` read.

    Orbax itself would take whole arrays, so this writes the same files piece by piece: an OCDBT database of zarr
    arrays, and the tree in `_METADATA`. Small arrays go to the database together.

    Args:
        folder: of the item, not there yet.
        tensors: path without `params` to tensor.
        whole: store each array as one chunk, as Orbax does on one host; it then has to be in memory at once.
    """
    import tensorstore as ts

    folder.mkdir(parents=True)
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    tree = {}
    batch, pending = ts.Transaction(), 0
    for name, tensor in tensors.items():
        path = ("params", *name.split("/"))
        small = tensor.nbytes <= PIECE_BYTES
        rows = max(1, tensor.shape[0]) if whole and tensor.shape else rows_per_piece(tensor)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": ".".join(path) + "/"},
            "metadata": {
                "shape": list(tensor.shape),
                "chunks": [rows, *tensor.shape[1:]] if tensor.shape else [],
                "dtype": "bfloat16" if tensor.dtype == ml_dtypes.bfloat16 else tensor.dtype.str,
                "compressor": {"id": "zstd", "level": 1},
                "fill_value": None,
                "order": "C",
                "filters": None,
            },
            "store_data_equal_to_fill_value": True,
        }
        store = ts.open(spec, create=True, context=context, transaction=batch if small else None).result()
        for start, piece in pieces(tensor, rows):
            view = store if start is None else store[start : start + len(piece)]
            view.write(np.ascontiguousarray(piece)).result()
        pending += tensor.nbytes if small else 0
        if pending > PIECE_BYTES:
            batch.commit_async().result()
            batch, pending = ts.Transaction(), 0
        tree[str(path)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(tensor.shape),
            },
        }
    batch.commit_async().result()
    now = time.time_ns()
    write_json(
        folder / "_METADATA",
        {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
    )
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    write_json(
        folder / "_CHECKPOINT_METADATA",
        {
            "item_handlers": handler,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        },
    )
