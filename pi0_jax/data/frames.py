"""Frames that are kept at the model's resolution once they have been decoded, for videos with few key frames.

A frame is decoded from the key frame before it. LeRobot writes one every second frame, and any frame is cheap; other
videos have one in 250, and a random frame costs some hundred. So all that is decoded on the way is kept, in the user's
cache, and each video is decoded about once, while training runs:

    <cache>/datasets/<dataset>/<camera>-<key>/pixels       frame i at 3 · size² · i, a file with holes
    <cache>/datasets/<dataset>/<camera>-<key>/checksums    of each frame, 0 where it is not there yet

`key` stands for the files that the frames come from and the size. Several threads and processes may write; what they
write is the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from pi0_jax.data.files import cache_folder
from pi0_jax.data.source import Rows, Source, Wrapped
from pi0_jax.data.transform import resize_with_pad
from pi0_jax.errors import UserError

SPARSE = 16
"""Frames per key frame above which frames are kept."""
AT_ONCE = 32
"""Frames that are decoded before they are made smaller."""

_log = logging.getLogger(__name__)


def keep_frames(source: Source, cameras: Sequence[str], size: int, limit_gb: float) -> Source:
    """The dataset, with the frames of cameras whose key frames are far apart kept; the log says what that takes."""
    sparse = {}
    for camera in cameras:
        try:
            distance = source.key_distance(camera) if camera in source.cameras else 1.0
        except (UserError, OSError):
            continue  # a file that cannot be read is an error when it is used
        if distance > SPARSE:
            sparse[camera] = distance
    if not sparse:
        return source
    folder = cache_folder(source.root, None)
    room = min(limit_gb * 1e9, 0.9 * shutil.disk_usage(folder).free)
    needed = 3 * size**2 * source.num_frames * len(sparse)
    share = min(1.0, room / needed)
    _log.info(
        "%s: key frames of %s are %.0f frames apart, so decoded frames are kept at %d px in %s: %.1f GB when all have "
        "been seen (--data.kept-gb is %g)%s",
        source.root,
        ", ".join(sparse),
        max(sparse.values()),
        size,
        folder,
        share * needed / 1e9,
        limit_gb,
        "" if share == 1 else f", which is {share:.0%} of them; the others are decoded each time",
    )
    return KeptFrames(source, list(sparse), size, folder, int(share * source.num_frames))


class KeptFrames(Wrapped):
    """A dataset whose pictures of some cameras are kept, square and `size` pixels wide, as `resize_with_pad` does it.

    Of each camera the first `rows` frames are kept, in `folder`.
    """

    def __init__(self, source: Source, cameras: Sequence[str], size: int, folder: Path, rows: int):
        super().__init__(source)
        self._size, self._kept = size, rows
        self._folders: dict[str, Path] = {}
        for camera in cameras:
            files = [(path, path.stat()) for path in source.picture_files(camera)]
            status = [(str(path), found.st_size, found.st_mtime_ns) for path, found in files]
            key = hashlib.sha256(repr((status, size, source.episodes)).encode()).hexdigest()[:16]
            prefix = camera.replace("/", "_")
            self._folders[camera] = folder / f"{prefix}-{key}"
            for stale in folder.glob(f"{prefix}-*"):
                if stale != self._folders[camera]:
                    shutil.rmtree(stale, ignore_errors=True)
            self._folders[camera].mkdir(parents=True, exist_ok=True)
            self.features[camera] = {**source.features[camera], "shape": (size, size, 3)}

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        self.check_camera(camera)
        if camera not in self._folders:
            return self.source.images(camera, rows)
        flat = np.asarray(rows).ravel()
        out = np.empty((flat.size, self._size, self._size, 3), np.uint8)
        missing = {row for i, row in enumerate(flat.tolist()) if not self._get(camera, row, out[i])}
        while missing:
            first = min(missing)
            group = self.source.together(camera, first) if self._keeps(first) else np.array([first])
            for start in range(0, len(group), AT_ONCE):
                piece = group[start : start + AT_ONCE]
                images = resize_with_pad(self.source.images(camera, piece), self._size)
                for row, image in zip(piece.tolist(), images, strict=True):
                    self._put(camera, row, image)
                    if row in missing:
                        out[flat == row] = image
            missing -= {*group.tolist()}
        return out.reshape(*np.shape(rows), *out.shape[1:])

    def _keeps(self, row: int) -> bool:
        return row < self._kept and not vars(self).get("_full")

    def _files(self, camera: str) -> tuple[int, int]:
        opened = self.opened().setdefault("kept", {})
        if camera not in opened:
            names = (self._folders[camera] / name for name in ("pixels", "checksums"))
            opened[camera] = tuple(os.open(name, os.O_RDWR | os.O_CREAT) for name in names)
        return opened[camera]

    def _get(self, camera: str, row: int, out: np.ndarray) -> bool:
        """Reads a frame if it is there."""
        pixels, checksums = self._files(camera)
        if row >= self._kept or not any(checksum := os.pread(checksums, 8, 8 * row)):
            return False
        content = os.pread(pixels, out.nbytes, out.nbytes * row)
        if _checksum(content) != checksum:
            return False
        out[...] = np.frombuffer(content, np.uint8).reshape(out.shape)
        return True

    def _put(self, camera: str, row: int, image: np.ndarray) -> None:
        """Keeps a frame, unless the disk is full."""
        if not self._keeps(row):
            return
        pixels, checksums = self._files(camera)
        content = image.tobytes()
        try:
            os.pwrite(pixels, content, len(content) * row)
            os.pwrite(checksums, _checksum(content), 8 * row)
        except OSError as error:
            self._full = True
            _log.warning("%s: no more frames are kept: %s", self._folders[camera], error)


def _checksum(content: bytes) -> bytes:
    return (zlib.crc32(content) | 1 << 32).to_bytes(8, "little")
