"""Video with PyAV: written so that any frame is cheap to find, and read by the number of the frame."""

from __future__ import annotations

import io
from collections.abc import Iterator
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

from pi0_jax.data.files import advice
from pi0_jax.errors import UserError

KEY_FRAME_EVERY = 2
PRESET = "veryfast"
"""Of the H.264 encoder x264."""
_DECODING_ERRORS = (FFmpegError, IndexError, EOFError)
PACKETS_COMPARED = 64
"""Packets of a file that are held against its own table of frames."""
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
    """Decodes single frames of video files by their number, and keeps the files open that it used last.

    A file's frames are listed once, without decoding; `indices` has those lists, which readers of several threads may
    share. Frames are decoded from the key frame before them; a few that
    follow one another cost one such start.
    """

    def __init__(self, max_open: int = 32, indices: dict[Path, _Index] | None = None):
        self._max_open = max_open
        self._indices = {} if indices is None else indices
        self._opened: dict[Path, _OpenVideo] = {}

    def seconds(self, path: Path) -> Float[np.ndarray, "n"]:
        """When each frame of a file is shown, from its beginning.

        Raises:
            VideoError: it cannot be read.
            FileNotFoundError: there is no file.
        """
        index = self._index(path)
        return (index.times - index.times[0]) * index.unit

    def group(self, path: Path, number: int) -> tuple[int, int]:
        """Numbers of the key frame from which a frame is decoded, and of the next one; errors as of `seconds`."""
        index = self._index(path)
        starts = np.searchsorted(index.times, index.keys)
        key = int(np.searchsorted(starts, number, side="right"))
        return int(starts[key - 1]) if key else 0, int(starts[key]) if key < len(starts) else len(index.times)

    def num_groups(self, path: Path) -> int:
        """Number of key frames of a file; errors as of `seconds`."""
        return len(self._index(path).keys)

    def read(
        self, path: Path, numbers: Int[np.ndarray, "k"], out: UInt8[np.ndarray, "n h w 3"], at: Int[np.ndarray, "k"]
    ) -> None:
        """Writes the frames of those numbers to `out[at]`, RGB.

        Raises:
            VideoError: a frame cannot be decoded, or is of another size than `out`, or errors as of `seconds`.
            FileNotFoundError: there is no file.
        """
        index = self._index(path)
        video = self._open(path)
        for i in np.argsort(numbers, kind="stable").tolist():
            try:
                image = video.frame(index, int(numbers[i]))
            except _DECODING_ERRORS as error:
                self._opened.pop(path).close()
                raise VideoError(
                    f"{path}: frame {numbers[i]} cannot be decoded ({_said(error)}). Copy the dataset again.",
                    np.array([i]),
                ) from error
            if image.shape != out.shape[1:]:
                raise VideoError(
                    f"{path} holds images of shape {image.shape}; meta/info.json says {out.shape[1:]}.", np.array([i])
                )
            out[at[i]] = image

    def _index(self, path: Path) -> _Index:
        if path not in self._indices:
            if not path.is_file():
                raise FileNotFoundError(f"there is no video {path}. Copy the dataset again.")
            try:
                self._indices[path] = _list_frames(path)
            except _DECODING_ERRORS as error:
                raise VideoError(f"{path} cannot be decoded ({_said(error)}). {advice(path)}") from error
        return self._indices[path]

    def _open(self, path: Path) -> _OpenVideo:
        video = self._opened.pop(path, None)
        if video is None:
            while len(self._opened) >= self._max_open:
                self._opened.pop(next(iter(self._opened))).close()
            try:
                video = _OpenVideo(path)
            except _DECODING_ERRORS as error:
                raise VideoError(f"{path} cannot be opened ({_said(error)}).") from error
        self._opened[path] = video  # the last one used is the last one to go
        return video


class _OpenVideo:
    """One open file and how far it was decoded.

    Packets come from one generator, which goes on after a seek: each that is left unfinished costs PyAV 18 some 250
    bytes for ever.
    """

    def __init__(self, path: Path):
        self._path, self._upright = path, False
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._stream.thread_count = 1
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
                    if not self._upright:
                        _check_upright(frame, self._path)
                        self._upright = True
                    return _pixels(self._reformatter.reformat(frame, format="rgb24", threads=1))
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


def _check_upright(frame: VideoFrame, path: Path) -> None:
    """Raises VideoError where players are to turn or mirror the pictures: programs differ in whether they do."""
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # it has something beside the matrix that this PyAV does not know
        matrix = None
    upright = matrix is None or np.frombuffer(matrix, np.int32)[:5].tolist() == [1 << 16, 0, 0, 0, 1 << 16]
    if upright and not frame.rotation:
        return
    what = f"turned by {-frame.rotation % 360} degrees clockwise" if frame.rotation else "mirrored"
    raise VideoError(
        f"{path} asks to be shown {what}, which some programs do and others do not. Write it as it is to be seen, "
        "`ffmpeg -i OLD.mp4 -c:v libx264 -g 2 -crf 12 NEW.mp4`, and see that meta/info.json has its height and width."
    )


def _list_frames(path: Path) -> _Index:
    return _listed_by_container(path) or _listed_by_packets(path)


def _listed_by_container(path: Path) -> _Index | None:
    """The frames by the file's own table, which takes no reading of the file; None where frames are not stored in the
    order they are shown, the table is not complete, or PyAV is too old to give it."""
    with av.open(str(path)) as container:
        stream = next(iter(container.streams.video), None)
        entries = getattr(stream, "index_entries", None)
        if stream is None or not entries or len(entries) != stream.frames:
            return None
        if stream.codec_context is None or stream.codec_context.has_b_frames:
            return None
        table = [(each.timestamp, each.is_keyframe, each.pos + each.size, each.is_discard) for each in entries]
        times, is_key, ends, left_out = (np.array(column) for column in zip(*table, strict=True))
        if (np.diff(times) <= 0).any() or left_out.any() or not is_key[0] or ends.max() > path.stat().st_size:
            return None
        for packet, time in zip(container.demux(stream), times[:PACKETS_COMPARED].tolist(), strict=False):
            if (packet.pts, packet.dts) != (time, time) and packet.size:
                return None
        return _Index(times, times[is_key], times[is_key], float(stream.time_base or 0))


def _listed_by_packets(path: Path) -> _Index:
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
            if not packet.is_discard:  # which is decoded, and cut off by the file's edit list
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
