"""openpi's wire format: msgpack, with numpy arrays as maps of bytes keys. Decoding cannot run code from the network.

An array is {b"__ndarray__": true, b"data": C-order bytes, b"dtype": numpy's string, b"shape": [..]}, a numpy scalar
{b"__npgeneric__": true, b"data": value, b"dtype": ..}. Sizes are limited while a frame is decoded, so that a few bytes
cannot allocate much memory. Decoded arrays are read-only. There is no pickle and there are no object arrays.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

_DTYPE = re.compile(r"[<>|=]?[biufU]\d+")


class WireError(ValueError):
    """A frame, or a value for one, that this protocol does not allow."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes beyond which a frame is refused."""

    frame_bytes: int = 32 << 20
    array_bytes: int = 16 << 20
    """Bytes of one array: a float32 image of 1080 x 1280 pixels fits."""
    array_dims: int = 4
    depth: int = 8
    """Maps and lists within one another."""
    items: int = 1024
    """Items of one list or map."""
    values: int = 20_000
    """Items of all lists and maps. The elements of arrays do not count."""


def pack(value: Any) -> bytes:
    """Encodes numbers, strings, bytes, lists, maps, and numpy arrays and scalars as a frame.

    Other types, and arrays of objects, of complex numbers or of types that are not numpy's own, are a WireError.
    """
    try:
        return msgpack.Packer(default=_encode).pack(value)
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"cannot be sent: {error}") from error


def unpack(frame: bytes, limits: Limits | None = None) -> Any:
    """Decodes a frame; WireError if it is damaged, beyond the limits, or has values that no observation has. Arrays are
    read-only views: copy one before changing it."""
    limits = limits or Limits()
    if len(frame) > limits.frame_bytes:
        raise WireError(f"the frame has {len(frame)} bytes; at most {limits.frame_bytes} are accepted.")
    values = 0

    def count(container: Any) -> Any:
        nonlocal values
        values += len(container)
        if values > limits.values:
            raise WireError(f"the frame has more than {limits.values} values. Send arrays as arrays, not as lists.")
        return _decode(container, limits) if isinstance(container, dict) else container

    try:
        value = msgpack.unpackb(
            frame,
            object_hook=count,
            list_hook=count,
            max_array_len=limits.items,
            max_map_len=limits.items,
            ext_hook=_refuse_extension,
            max_ext_len=0,
        )
    except WireError:
        raise
    except Exception as error:  # of many types, all about the frame
        hint = " Send arrays as arrays, not as lists." if "max_array_len" in str(error) else ""
        raise WireError(f"the frame cannot be decoded: {type(error).__name__} {error}"[:300] + hint) from error
    _check_depth(value, limits.depth)
    return value


def _check_depth(value: Any, depth: int) -> None:
    if isinstance(value, (list, Mapping)):
        if not depth:
            raise WireError("the frame has lists or maps that are nested too deep.")
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_depth(item, depth - 1)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"the frame has a value of extension type {code}.")


def _encode(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise WireError(f"{type(value).__name__} cannot be sent. Turn it into numbers, strings or numpy arrays.")
    if value.dtype.kind not in "biufU":
        raise WireError(f"arrays of type {value.dtype} cannot be sent. Cast it, to float32 for instance.")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _decode(entry: dict, limits: Limits) -> Any:
    """A map as it is, or the array or scalar that it encodes."""
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
        raise WireError(f"an array has {len(data)} bytes; at most {limits.array_bytes} are accepted.")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"an array of {dtype} and shape {shape} came with {len(data)} bytes.")
    return np.ndarray(buffer=data, dtype=dtype, shape=shape)


def _dtype(name: Any) -> np.dtype:
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else name
    if not isinstance(name, str) or len(name) > 12 or not _DTYPE.fullmatch(name):
        raise WireError(f"an array is of type {str(name)[:40]!r}; numbers, booleans and text are accepted.")
    try:
        return np.dtype(name)
    except TypeError as error:
        raise WireError(f"numpy has no type {name!r}.") from error
