"""Lazy arrays: tensors on disk that are read in pieces when asked; safetensors and npz. No torch.

A `LazyArray` knows its shape and reads all of itself or some entries of its first axis. A conversion is a dictionary of
lazy arrays whose `read` rearranges what another `read` returns, so that no more than a few layers are in memory at a
time, whatever the size of the model.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pi0_jax.errors import UserError

PIECE_BYTES = 2**26
"""Size of a storage chunk, and of a piece of an array, where entries of the first axis are smaller than that."""

Index = int | slice | None
"""Into the first axis: one entry, consecutive ones (start and stop inside the array), or all."""


class LazyArray(NamedTuple):
    """An array that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    """Reads everything, one entry along the first axis, or some of them."""
    stacked: bool = False
    """Whether one entry is read without reading the others."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


LazyArrays = dict[str, LazyArray]
"""Name, or path joined by "/", to array."""


def in_memory(array: np.ndarray) -> LazyArray:
    """An array that is in memory already."""
    return LazyArray(array.shape, array.dtype, lambda i: array if i is None else array[i, ...], stacked=array.ndim > 0)


def computed(shape: tuple[int, ...], dtype: np.dtype, whole: Callable[[], np.ndarray]) -> LazyArray:
    """An array that is made as a whole whenever any of it is read."""
    return LazyArray(shape, dtype, lambda i: whole() if i is None else whole()[i, ...])


def entry_by_entry(shape: tuple[int, ...], dtype: np.dtype, entry: Callable[[int], np.ndarray]) -> LazyArray:
    """An array of which each entry of the first axis is read by itself."""
    return LazyArray(shape, dtype, functools.partial(_read_entries, shape, dtype, entry), stacked=True)


def _read_entries(shape: tuple[int, ...], dtype: np.dtype, entry: Callable[[int], np.ndarray], i: Index) -> np.ndarray:
    if isinstance(i, int):
        return entry(i)
    numbers = range(shape[0]) if i is None else range(i.start, i.stop)
    out = np.empty((len(numbers), *shape[1:]), dtype)
    for place, number in enumerate(numbers):
        out[place] = entry(number)
    return out


def all_finite(tensors: Mapping[str, LazyArray]) -> LazyArrays:
    """The weights, whose reading raises UserError with a tensor's name where numbers are not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in "fV":
            raise UserError(f"tensor {name} has dtype {tensor.dtype}; weights are floating-point numbers.")
    return {n: tensor._replace(read=functools.partial(_read_finite, n, tensor)) for n, tensor in tensors.items()}


def _read_finite(name: str, array: LazyArray, i: Index) -> np.ndarray:
    found = array.read(i)
    flat = np.asarray(found).reshape(-1)
    for start in range(0, flat.size, 2**22):
        if not np.isfinite(flat[start : start + 2**22].astype(np.float32)).all():
            raise UserError(f"tensor {name} holds numbers that are not finite; the checkpoint is damaged.")
    return found


def pieces(array: LazyArray, rows: int | None = None) -> Iterator[tuple[int | None, np.ndarray]]:
    """The array in order: some rows of a stacked one at a time with the index of the first, or (None, everything)."""
    rows = rows_per_piece(array) if rows is None else rows
    if not array.stacked or not array.shape:
        yield None, array.read(None)
    elif rows >= array.shape[0]:
        yield 0, array.read(None)
    else:
        for start in range(0, array.shape[0], rows):
            stop = min(start + rows, array.shape[0])
            yield start, array.read(start)[None] if rows == 1 else array.read(slice(start, stop))


def pieces_of_both(a: LazyArray, b: LazyArray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of two arrays of one shape, side by side."""
    stacked, rows = a.stacked and b.stacked, rows_per_piece(a)
    both = (pieces(array._replace(stacked=stacked), rows) for array in (a, b))
    for (_, x), (_, y) in zip(*both, strict=True):
        yield x, y


def rows_per_piece(array: LazyArray) -> int:
    """How many entries of the first axis make a piece of `PIECE_BYTES` (at least one, at most all)."""
    if not array.shape:
        return 1
    return min(max(1, PIECE_BYTES * array.shape[0] // max(1, array.nbytes)), max(1, array.shape[0]))


def read_all(arrays: Mapping[str, LazyArray]) -> dict[str, np.ndarray]:
    """Reads arrays into memory."""
    return {name: np.asarray(array.read(None)) for name, array in arrays.items()}


# --------------------------------------------------------------------------------------------------------- safetensors

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
_DTYPES = {name: np.dtype(kind) for name, kind in (_FLOATS | _INTEGERS).items()}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_safetensors(path: Path) -> LazyArrays:
    """Opens a `.safetensors` file: a JSON header with dtype, shape and offsets, then the bytes.

    A file that is damaged or cut short, or a dtype that numpy lacks, is a UserError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length + 8 > size:
            raise UserError(f"{path} is no safetensors file, or is cut short: {size} bytes.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} is no safetensors file: its header is not JSON ({error}).") from error
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}, and only {', '.join(_DTYPES)} are read. "
                "Store it in one of those (quantised weights cannot be converted)."
            )
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or length + 8 + end > size:
            raise UserError(f"{path} is damaged or cut short at tensor {name!r}: it needs {end + length + 8} bytes.")
        arrays[name] = _uncompressed(path, 8 + length + begin, shape, dtype)
    return arrays


def write_safetensors(path: Path, arrays: Mapping[str, LazyArray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a `.safetensors` file, one piece of an array at a time, in the order of `arrays`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, array in arrays.items():
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            for _, piece in pieces(array):
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def _uncompressed(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
    """An array that lies uncompressed in a file, in C order."""
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

    return LazyArray(shape, dtype, read, stacked=len(shape) > 0)


# ----------------------------------------------------------------------------------------------------------------- npz


def open_npz(path: Path) -> LazyArrays:
    """Opens an `.npz`; UserError if it is none, or has Python objects in it. Arrays of numpy's two-byte void type are
    bfloat16, which numpy forgets when it saves."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no npz file: {error}.") from error
    arrays = {}
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
                raise UserError(f"{path}: {name!r} holds Python objects, which are not read: they can run code.")
            if member.compress_type == zipfile.ZIP_STORED and not fortran:
                arrays[name] = _uncompressed(path, _data_offset(path, member) + head, shape, dtype)
            else:
                arrays[name] = _compressed(path, name, shape, dtype)
    return arrays


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: after its local header, whose lengths may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + name + extra


def _compressed(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> LazyArray:
    def read() -> np.ndarray:
        with np.load(path, allow_pickle=False) as file:
            return np.ascontiguousarray(file[name]).view(dtype)

    return computed(shape, dtype, read)
