"""Messages between two interpreters over a pipe: JSON, and the bytes of numpy arrays after it. Needs numpy alone."""

from __future__ import annotations

import json
import struct
from typing import IO, Any

import numpy as np

ARRAY = "__array__"


def send(pipe: IO[bytes], value: Any) -> None:
    """Writes a value of None, bool, int, float, str, lists, tuples (which arrive as lists), dicts with names as keys,
    and numpy arrays and scalars."""
    arrays: list[np.ndarray] = []

    def pack(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            arrays.append(np.ascontiguousarray(x))
            return {ARRAY: len(arrays) - 1}
        if isinstance(x, np.generic):
            return x.item()
        if isinstance(x, dict):
            return {str(name): pack(each) for name, each in x.items()}
        return [pack(each) for each in x] if isinstance(x, (list, tuple)) else x

    packed = pack(value)  # fills `arrays`
    head = json.dumps([packed, [(x.dtype.str, x.shape) for x in arrays]]).encode()
    pipe.write(struct.pack("<Q", len(head)) + head)
    for x in arrays:
        pipe.write(x.reshape(-1).view(np.uint8).data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Reads what `send` wrote; `EOFError` where the other side has ended."""
    value, kinds = json.loads(_read(pipe, struct.unpack("<Q", _read(pipe, 8))[0]))
    arrays = []
    for kind, shape in kinds:
        x = np.empty(shape, np.dtype(kind))
        x.reshape(-1).view(np.uint8)[:] = np.frombuffer(_read(pipe, x.nbytes), np.uint8)
        arrays.append(x)

    def unpack(x: Any) -> Any:
        if isinstance(x, dict):
            return arrays[x[ARRAY]] if ARRAY in x else {name: unpack(each) for name, each in x.items()}
        return [unpack(each) for each in x] if isinstance(x, list) else x

    return unpack(value)


def _read(pipe: IO[bytes], count: int) -> bytes:
    found = pipe.read(count)
    if len(found) < count:
        raise EOFError
    return found
