"""Records of RLDS shards: `tfrecord` files taken apart without tensorflow, and `array_record` files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pi0_jax.data.files import open_array_record
from pi0_jax.data.source import BadEpisode
from pi0_jax.errors import require_package

FORMATS = ("tfrecord", "array_record")


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
