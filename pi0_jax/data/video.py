"""Video with PyAV: written so that any frame is cheap to find, and decoded once into a memory-mapped array.

Decoding from beginning to end costs some 0.2 ms a frame at 48 px, jumping to a random frame several times that, and
training visits each frame dozens of times. So all frames are decoded at the first use and kept on disk, uncompressed.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import uuid
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8
from tqdm import tqdm

KEY_FRAME_EVERY = 2
PRESET = "veryfast"
"""Of the H.264 encoder x264."""
PIXELS_FOR_THREADS = 256 * 256
"""Frames below this size cost less than handing them to other threads, on a busy machine by far."""


class VideoWriter:
    """Writes one H.264 file without B-frames, a key frame at every second frame.

    Args:
        path: file to create, `.mp4`.
        size: height and width, pixels.
        fps: frames per second.
        pix_fmt: pixel format, "yuv444p" or "yuv420p".
        crf: quality, 0 (best) to 51.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: int, pix_fmt: str, crf: int):
        self.num_frames = 0
        """Frames written so far."""
        self.num_bytes = 0
        """Compressed size so far."""
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps))
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = pix_fmt
        self._stream.thread_count = self._threads = _threads(*size)
        self._reformatter = VideoReformatter()
        options = {"crf": crf, "preset": PRESET, "g": KEY_FRAME_EVERY, "bf": 0, "forced-idr": 1}
        self._stream.options = {key: str(value) for key, value in options.items()}

    def write(self, images: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Appends RGB frames, the first of them as a key frame."""
        for i, image in enumerate(images):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = self._reformatter.reformat(frame, format=self._stream.pix_fmt, threads=self._threads)
            frame.pts = self.num_frames
            if i == 0:
                frame.pict_type = PictureType.I
            self._mux(frame)
            self.num_frames += 1

    def close(self) -> None:
        """Completes the file."""
        self._mux(None)
        self._container.close()

    def _mux(self, frame: VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self.num_bytes += packet.size
            self._container.mux(packet)


class Clip(NamedTuple):
    """Where some rows of a dataset are in one video file."""

    path: Path
    rows: Int[np.ndarray, "n"]
    numbers: Int[np.ndarray, "n"]
    """Number of the video's frame for each row, counted from 0."""


def decode_once(
    name: str, clips: list[Clip], fps: int, shape: tuple[int, int, int, int], folder: Path
) -> UInt8[np.ndarray, "n h w 3"]:
    """All frames of one camera as a read-only memory-mapped array, decoded at the first call.

    The array is an ordinary `.npy` file. Its name tells the clips' sizes and times of change, so that changed video is
    decoded again; what it replaces is removed. A file of that name is always complete.

    Args:
        name: the camera.
        clips: its video files; together they fill all rows.
        fps: frames per second.
        shape: frames, height, width, 3.
        folder: where decoded arrays are kept.

    Raises:
        ValueError: a video is damaged, cut short or of another size, or the array does not fit on the disk.
    """
    key = hashlib.sha256(repr((shape, fps)).encode())
    for clip in clips:
        status = clip.path.stat()
        key.update(repr((str(clip.path), status.st_size, status.st_mtime_ns)).encode())
        key.update(clip.rows.tobytes() + clip.numbers.tobytes())
    prefix = name.replace("/", "_")
    target = folder / f"{prefix}-{key.hexdigest()[:16]}.npy"
    if not target.exists():
        needed, free = math.prod(shape), shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"decoding {name!r} takes {needed / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} GB left. "
                "Pass a `cache` folder with more room."
            )
        partial = folder / f"{target.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            with tqdm(total=shape[0], desc=f"decoding {name}", unit="frame") as progress:
                for clip in clips:
                    _decode(clip, fps, array, progress)
            array.flush()
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
        for stale in folder.glob(f"{prefix}-*.npy"):
            if stale != target:
                stale.unlink(missing_ok=True)
    return np.load(target, mmap_mode="r")


def cache_folder(root: Path, chosen: Path | None) -> Path:
    """A folder for decoded video that can be written to: the chosen one; else in the dataset; else a temporary one.

    Raises:
        ValueError: none of them can be written to.
    """
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    candidates = [root / ".cache", Path(tempfile.gettempdir()) / f"pi0_jax-{owner}" / name]
    for folder in candidates if chosen is None else [chosen]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise ValueError(f"no folder for decoded video of {root} can be written to. Pass one as `cache`.")


def _threads(height: int, width: int) -> int:
    """1, or 0 to let FFmpeg choose."""
    return 1 if height * width < PIXELS_FOR_THREADS else 0


def _decode(clip: Clip, fps: int, out: np.ndarray, progress: tqdm) -> None:
    wanted: dict[int, list[int]] = {}
    for row, number in zip(clip.rows.tolist(), clip.numbers.tolist(), strict=True):
        wanted.setdefault(number, []).append(row)
    total, last = len(wanted), -1
    reformatter = VideoReformatter()  # one for all frames: a new one for each halves the speed
    try:
        with av.open(str(clip.path)) as container:
            stream = container.streams.video[0]
            threads = _threads(stream.height, stream.width)
            stream.thread_type, stream.thread_count = "AUTO", threads
            for frame in container.decode(stream):
                last = round(frame.time * fps)
                if rows := wanted.pop(last, None):
                    image = reformatter.reformat(frame, format="rgb24", threads=threads).to_ndarray()
                    if image.shape != out.shape[1:]:
                        raise ValueError(
                            f"{clip.path} holds images of shape {image.shape}; meta/info.json says {out.shape[1:]}."
                        )
                    out[rows] = image
                    progress.update(len(rows))
    except (FFmpegError, IndexError) as error:
        raise ValueError(
            f"{clip.path} cannot be decoded ({error}); {total - len(wanted)} of {total} frames came out before. "
            "Copy the dataset again."
        ) from error
    if wanted:
        raise ValueError(
            f"{clip.path} is cut short: {len(wanted)} of {total} frames are missing, the first of them number "
            f"{min(wanted)}; the last that it holds is number {last}. Copy the dataset again."
        )
