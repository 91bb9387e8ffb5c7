"""openpi's frames: msgpack, with numpy arrays as maps of bytes keys. Nothing here can run code that came by wire.

An array is {b"__ndarray__": true, b"data": C-order bytes, b"dtype": numpy's string, b"shape": [..]}, a numpy scalar
{b"__npgeneric__": true, b"data": value, b"dtype": ..}. What comes in is walked over before it is decoded, so that a few
bytes cannot ask for much memory; arrays then are read-only views of the frame. There is no pickle and no object array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import msgpack
import numpy as np


class WireError(ValueError):
    """A frame, or a value for one, that this protocol does not allow."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a frame may ask of its reader."""

    frame_bytes: int = 32 << 20
    array_bytes: int = 16 << 20
    """Of one array: a float32 image of 1080 x 1280 pixels fits."""
    array_dims: int = 4
    depth: int = 8
    """Of maps and lists within one another."""
    values: int = 20_000
    """Numbers, strings, keys, maps and lists together. The elements of an array do not count."""


_DTYPE = re.compile(r"[<>|=]?[biufU]\d+")
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
"""First byte of a number to the bytes that follow."""
_COUNTED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""First byte of bytes and strings to the width of their length."""
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""First byte of lists and maps to the width of their count, and how many values an entry has."""


def pack(value: Any) -> bytes:
    """A frame of numbers, strings, bytes, lists, maps, and numpy arrays and scalars.

    Raises:
        WireError: another type, or an array of objects, of complex numbers or of a type that is not numpy's own.
    """
    try:
        return msgpack.Packer(default=_encode).pack(value)
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"cannot be sent: {error}") from error


def unpack(frame: bytes, limits: Limits | None = None) -> Any:
    """The value in a frame. Arrays are read-only views: copy one before changing it.

    Raises:
        WireError: it is damaged, beyond the limits, or holds what no observation has.
    """
    limits = limits or Limits()
    if len(frame) > limits.frame_bytes:
        raise WireError(f"the frame has {len(frame)} bytes; at most {limits.frame_bytes} are taken.")
    _walk(frame, limits)
    try:
        return msgpack.unpackb(frame, object_hook=functools.partial(_decode, limits=limits))
    except WireError:
        raise
    except Exception as error:  # of many types, all about the frame
        raise WireError(f"the frame cannot be decoded: {type(error).__name__} {error}"[:300]) from error


def _walk(frame: bytes, limits: Limits) -> None:
    """Goes over a frame without decoding it.

    Raises:
        WireError: it is cut short, has bytes left over, or goes beyond the limits.
    """
    position, values = 0, 1
    pending = [1]  # values still to come, at each depth
    while pending:
        if not pending[-1]:
            pending.pop()
            continue
        pending[-1] -= 1
        position, children = _step(frame, position)
        values += children
        if values > limits.values:
            raise WireError(f"the frame has more than {limits.values} values. Send arrays as arrays, not as lists.")
        if children:
            pending.append(children)
            if len(pending) - 1 > limits.depth:
                raise WireError(f"the frame is nested more than {limits.depth} deep.")
    if position > len(frame):
        raise WireError("the frame is cut short.")
    if position < len(frame):
        raise WireError(f"{len(frame) - position} bytes follow after the end of the frame's value.")


def _step(frame: bytes, position: int) -> tuple[int, int]:
    """Where the value at `position` ends, and how many values it holds; for a container, where its head ends."""
    if position >= len(frame):
        raise WireError("the frame is cut short.")
    first = frame[position]
    position += 1
    if first in _FIXED:
        return position + _FIXED[first], 0
    if first in _COUNTED:
        width = _COUNTED[first]
        return position + width + int.from_bytes(frame[position : position + width], "big"), 0
    if first in _CONTAINERS:
        width, each = _CONTAINERS[first]
        return position + width, each * int.from_bytes(frame[position : position + width], "big")
    if first < 0x80 or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):
        return position, 0
    if first < 0x90:
        return position, 2 * (first - 0x80)
    if first < 0xA0:
        return position, first - 0x90
    if first < 0xC0:
        return position + first - 0xA0, 0
    raise WireError(f"the frame has a value of the unknown or extended type {first:#x}.")


def _encode(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise WireError(f"{type(value).__name__} cannot be sent. Turn it into numbers, strings or numpy arrays.")
    if value.dtype.kind not in "biufU":
        raise WireError(f"arrays of type {value.dtype} cannot be sent. Cast it, to float32 for instance.")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _decode(entry: dict, limits: Limits) -> Any:
    if b"__ndarray__" not in entry and b"__npgeneric__" not in entry:
        return entry
    if missing := {b"data", b"dtype"} - set(entry):
        raise WireError(f"an array lacks {sorted(str(name, 'ascii') for name in missing)}.")
    dtype = _dtype(entry[b"dtype"])
    if b"__npgeneric__" in entry:
        if not isinstance(entry[b"data"], (bool, int, float, str)):
            raise WireError(f"a scalar came as {type(entry[b'data']).__name__}.")
        return dtype.type(entry[b"data"])
    data, shape = entry[b"data"], entry.get(b"shape")
    if not isinstance(data, bytes) or not isinstance(shape, list):
        raise WireError("an array's data have to be bytes, and its shape a list.")
    if len(shape) > limits.array_dims or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise WireError(f"an array has shape {str(shape)[:80]}; expected at most {limits.array_dims} whole numbers.")
    if len(data) > limits.array_bytes:
        raise WireError(f"an array has {len(data)} bytes; at most {limits.array_bytes} are taken.")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"an array of {dtype} and shape {shape} came with {len(data)} bytes.")
    return np.ndarray(buffer=data, dtype=dtype, shape=shape)


def _dtype(name: Any) -> np.dtype:
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else name
    if not isinstance(name, str) or len(name) > 12 or not _DTYPE.fullmatch(name):
        raise WireError(f"an array is of type {str(name)[:40]!r}; numbers, booleans and text are taken.")
    try:
        return np.dtype(name)
    except TypeError as error:
        raise WireError(f"numpy has no type {name!r}.") from error
