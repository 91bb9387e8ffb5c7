"""Video with PyAV: written so that any frame is cheap to find, and decoded once into a memory-mapped array.

Decoding from beginning to end costs some 0.2 ms a frame at 48 px, jumping to a random frame several times that, and
training visits each frame dozens of times. So all frames are decoded at the first use and kept on disk, uncompressed.
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import PIL.Image
from av.error import FFmpegError
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from pi0_jax.atomic import written
from pi0_jax.errors import UserError

KEY_FRAME_EVERY = 2
PRESET = "veryfast"
"""Of the H.264 encoder x264."""
_DECODING_ERRORS = (FFmpegError, IndexError, EOFError)
PIXELS_FOR_THREADS = 256 * 256
"""Frames below this size cost less than handing them to other threads, on a busy machine by far."""


class VideoWriter:
    """Writes one H.264 file without B-frames, a key frame at every second frame.

    `size` is height and width; `pix_fmt` "yuv444p" or "yuv420p"; `crf` the quality, 0 (best) to 51.
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


class VideoError(UserError):
    """A video that cannot be decoded, or lacks frames."""

    def __init__(self, message: str, rows: np.ndarray | slice = slice(None)):
        super().__init__(message)
        self.rows = rows
        """Which of the frames that were asked for it concerns; by default all."""


def decode_once(
    name: str,
    files: Sequence[Path],
    key: bytes,
    shape: tuple[int, ...],
    folder: Path,
    fill: Callable[[np.ndarray, tqdm], None],
) -> UInt8[np.ndarray, "n h w 3"]:
    """All frames of one camera as a read-only memory-mapped array, decoded at the first call.

    The array is an ordinary `.npy` file. Its name tells `key`, the shape and the files' sizes and times of change, so
    that changed video is decoded again; what it replaces is removed. A file of that name is always complete. `key` is
    what the frames depend on besides the files; `shape` is frames, height, width, 3; `fill` decodes into an array of
    that shape, and moves the bar on.

    Raises:
        FileNotFoundError: a video is missing.
        UserError: the array does not fit on the disk; or as of `fill`.
    """
    if missing := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} videos are missing, such as {missing[0]}. Copy the dataset again.")
    status = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(key + repr((shape, status)).encode()).hexdigest()[:16]
    prefix = name.replace("/", "_")
    target = folder / f"{prefix}-{digest}.npy"
    if not target.exists():
        needed, free = math.prod(shape), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"decoding {name!r} takes {needed / 1e6:,.1f} MB; {folder} has {free / 1e6:,.1f} MB left. "
                "Pass a `cache` folder with more room."
            )
        with written(target) as partial:
            array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            with tqdm(total=shape[0], desc=f"decoding {name}", unit="frame") as progress:
                fill(array, progress)
            array.flush()
        for stale in folder.glob(f"{prefix}-*.npy"):
            if stale != target:
                stale.unlink(missing_ok=True)
    return np.load(target, mmap_mode="r")


def _threads(height: int, width: int) -> int:
    """1, or 0 to let FFmpeg choose."""
    return 1 if height * width < PIXELS_FOR_THREADS else 0


class _Index(NamedTuple):
    """When the frames of a video file are shown, in units of its time base, and where decoding can start."""

    times: Int[np.ndarray, "n"]
    """Of each frame, in the order they are shown."""
    keys: Int[np.ndarray, "k"]
    """Those of key frames."""
    seek: Int[np.ndarray, "k"]
    """What to seek to for each key frame: its decoding time."""
    unit: float
    """Seconds."""


class FrameReader:
    """Decodes single frames of video files, and keeps the files open that it used last.

    A file's frames are listed once, without decoding, so that a time always gives the frame shown then and no other.
    Frames are decoded from the key frame before them; a few that follow one another cost one such start. `threaded`
    decodes large frames with several threads, for files that are read from beginning to end.
    """

    def __init__(self, max_open: int = 32, *, threaded: bool = False):
        self._max_open, self._threaded = max_open, threaded
        self._indices: dict[Path, _Index] = {}
        self._opened: dict[Path, _OpenVideo] = {}

    def locate(self, path: Path, seconds: Float[np.ndarray, "n"], fps: int | float) -> Int[np.ndarray, "n"]:
        """Number of the frame that is shown at each time.

        Raises:
            VideoError: there is none within half a frame of the dataset's `fps`, or the file cannot be read.
            FileNotFoundError: there is no file.
        """
        index = self._index(path)
        units = seconds / index.unit
        after = np.clip(np.searchsorted(index.times, units), 1, max(1, len(index.times) - 1))
        before = after - 1
        after = np.minimum(after, len(index.times) - 1)
        nearest = np.where(units - index.times[before] <= index.times[after] - units, before, after)
        missing = np.flatnonzero(np.abs(index.times[nearest] - units) * index.unit > 0.5 / fps)
        if missing.size:
            first, last = seconds[missing].min(), index.times[-1] * index.unit
            raise VideoError(
                f"{path} is cut short: {missing.size} of {len(seconds)} frames are missing, the first of them number "
                f"{round(first * fps)} at {first:.3f} s; the last that it holds is number {round(last * fps)} at "
                f"{last:.3f} s. Copy the dataset again.",
                missing,
            )
        return nearest

    def read(
        self,
        path: Path,
        seconds: Float[np.ndarray, "k"],
        fps: int | float,
        out: UInt8[np.ndarray, "n h w 3"],
        at: Int[np.ndarray, "k"],
        progress: tqdm | None = None,
    ) -> None:
        """Writes the frames that are shown at `seconds` to `out[at]`, RGB; moves `progress` on.

        Raises:
            VideoError: a frame is missing, cannot be decoded, or is of another size than `out`.
            FileNotFoundError: there is no file.
        """
        index = self._index(path)
        numbers = self.locate(path, seconds, fps)
        video = self._open(path)
        order = np.argsort(numbers, kind="stable")
        for i in order.tolist():
            try:
                image = video.frame(index, int(numbers[i]))
            except _DECODING_ERRORS as error:
                self._opened.pop(path).close()
                raise VideoError(
                    f"{path} cannot be decoded at {seconds[i]:.3f} s ({_said(error)}). Copy the dataset again.",
                    np.array([i]),
                ) from error
            if image.shape != out.shape[1:]:
                raise VideoError(
                    f"{path} holds images of shape {image.shape}; meta/info.json says {out.shape[1:]}.", np.array([i])
                )
            out[at[i]] = image
            if progress is not None:
                progress.update()

    def _index(self, path: Path) -> _Index:
        if path not in self._indices:
            if not path.is_file():
                raise FileNotFoundError(f"there is no video {path}. Copy the dataset again.")
            try:
                self._indices[path] = _list_frames(path)
            except _DECODING_ERRORS as error:
                raise VideoError(f"{path} cannot be decoded ({_said(error)}). Copy the dataset again.") from error
        return self._indices[path]

    def _open(self, path: Path) -> _OpenVideo:
        video = self._opened.pop(path, None)
        if video is None:
            while len(self._opened) >= self._max_open:
                self._opened.pop(next(iter(self._opened))).close()
            try:
                video = _OpenVideo(path, self._threaded)
            except _DECODING_ERRORS as error:
                raise VideoError(f"{path} cannot be opened ({_said(error)}).") from error
        self._opened[path] = video  # the last one used is the last one to go
        return video


class _OpenVideo:
    """One open file and how far it was decoded.

    Packets come from one generator, which goes on after a seek: each that is left unfinished costs PyAV 18 some 250
    bytes for ever.
    """

    def __init__(self, path: Path, threaded: bool):
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._threads = _threads(self._stream.height, self._stream.width) if threaded else 1
        self._stream.thread_type, self._stream.thread_count = "AUTO", self._threads
        self._packets = self._container.demux(self._stream)
        self._reformatter = VideoReformatter()
        self._frames = iter(())
        self._next = -1
        """Number of the frame that decoding gives next; -1: not known."""

    def close(self) -> None:
        self._container.close()

    def frame(self, index: _Index, number: int) -> UInt8[np.ndarray, "h w 3"]:
        """The frame of that number, RGB, a view of the decoder's memory."""
        wanted = int(index.times[number])
        key = int(np.searchsorted(index.keys, wanted, side="right")) - 1
        first = int(np.searchsorted(index.times, index.keys[key])) if key >= 0 else 0
        for attempt in range(2):
            if not (first <= self._next <= number):
                self._frames = self._decoded()
                self._container.seek(int(index.seek[max(key, 0)]) if attempt == 0 else 0, stream=self._stream)
            for frame in self._frames:
                if frame.pts is None or frame.pts < wanted:
                    continue
                self._next = number + 1
                if frame.pts == wanted:
                    _check_whole(frame)
                    return _pixels(self._reformatter.reformat(frame, format="rgb24", threads=self._threads))
                break
            self._next = -1  # the seek went too far: once more from the beginning
        raise IndexError(f"frame {number} does not come out of the decoder")

    def _decoded(self) -> Iterator[VideoFrame]:
        """Frames from where the file is now to its end."""
        for packet in self._packets:
            frames = packet.decode()
            while frames:  # given away, not kept here: the decoder uses their memory again
                yield frames.pop(0)
        self._packets = self._container.demux(self._stream)


def _pixels(frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """A view of an RGB frame; `to_ndarray` copies it."""
    plane: Any = frame.planes[0]
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return lines[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def _check_whole(frame: VideoFrame) -> None:
    """Raises IndexError where the decoder filled in what it could not decode."""
    if frame.is_corrupt:
        raise IndexError("the frame is damaged")


def _list_frames(path: Path) -> _Index:
    times, keys, seek = [], [], []
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise IndexError("it holds no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise IndexError("its codec is not known to this FFmpeg: another version of PyAV may know it")
        for packet in container.demux(stream):
            if packet.pts is None or packet.is_corrupt:
                continue
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
                seek.append(packet.dts if packet.dts is not None else packet.pts)
        unit = float(stream.time_base or 0)
    if not times or not keys:
        raise IndexError("it holds no frames")
    order = np.argsort(keys)
    return _Index(np.sort(times), np.array(keys)[order], np.array(seek)[order], unit)


def decode_picture(encoded: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """A JPEG or PNG as RGB.

    Raises:
        OSError, UserError: it is neither, or damaged.
    """
    return np.asarray(PIL.Image.open(io.BytesIO(encoded)).convert("RGB"))


def _said(error: Exception) -> str:
    """What an error of FFmpeg says, without its number and the path, which our messages have."""
    return getattr(error, "strerror", None) or str(error)
