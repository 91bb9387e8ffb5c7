"""Frames decoded once and kept at the model's resolution, in ArrayRecord shards with checksums.

    <cache>/<camera>-<key>/manifest.json        what was decoded, and the SHA-256 of every file it came from
    <cache>/<camera>-<key>/shard-00000.array_record ...      one record per frame, in order

A record is a frame's bytes as they are, 3 · size² (150 kB at 224 px), or a JPEG of some 15 kB. ArrayRecord keeps a hash
of every block, so that damage on the disk is an error and not a wrong picture. `key` stands for the folder of the
dataset, its episodes and the size; a cache whose files have changed since is refused. Files are compared by their size
and time of change, and by their content where those differ.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from tqdm import tqdm

from pi0_jax.atomic import written
from pi0_jax.data.files import open_array_record, read_json
from pi0_jax.data.pool import run_tasks
from pi0_jax.data.source import BadEpisode, Rows, Source, Wrapped
from pi0_jax.data.transform import resize_with_pad
from pi0_jax.data.video import decode_picture
from pi0_jax.errors import UserError

FRAMES_PER_SHARD = 2048
DECODED_AT_ONCE = 64
SHARDS_OPEN = 256


def build_cache(
    source: Source,
    folder: Path,
    cameras: list[str],
    size: int,
    quality: int | None = None,
    workers: int | None = None,
    *,
    ray: bool = False,
) -> int:
    """Decodes and resizes all frames that are not in the cache yet. A build that was stopped goes on where it was.

    Images are square, of `size` pixels, resized as `resize_with_pad` does. `quality` is that of JPEG, 1 to 100; None
    keeps the pixels as they are. `workers` are processes; None: one per core. `ray` works on
    a Ray cluster instead, whose nodes have to see both folders.

    Returns:
        Bytes that the cache of these cameras has.

    Raises:
        UserError, FileNotFoundError: a frame cannot be read; the message names the file and the episode. Or there is
            no room.
    """
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"the quality of JPEG is {quality}; expected 1 to 100, or none for the pixels as they are.")
    tasks, targets = [], []
    for camera in cameras:
        target = _target(source, folder, camera, size)
        content = {"files": _files(source, camera), "size": size, "quality": quality, "frames": source.num_frames}
        known = _read_manifest(target)
        if known is not None and not _same(known, content):
            for path in sorted(target.glob("*")):
                path.unlink()
        target.mkdir(parents=True, exist_ok=True)
        for path, entry in content["files"].items():
            entry += [] if len(entry) == 3 else [_hash(Path(path))]
        with written(target / "manifest.json") as partial:
            partial.write_text(json.dumps(content))
        targets.append(target)
        for number, start in enumerate(range(0, source.num_frames, FRAMES_PER_SHARD)):
            if not _shard(target, number).exists():
                end = min(start + FRAMES_PER_SHARD, source.num_frames)
                tasks.append((source, camera, start, end, size, quality, _shard(target, number)))
    count = sum(end - start for _, _, start, end, *_ in tasks)
    needed, free = 3 * size**2 * count, shutil.disk_usage(folder).free
    if quality is None and needed > free:
        raise UserError(
            f"caching {count} frames takes {needed / 1e6:,.1f} MB; {folder} has {free / 1e6:,.1f} MB left. With "
            "--jpeg 95 it takes about a tenth."
        )
    with tqdm(total=count, desc=f"caching {source.root.name}", unit="frame", disable=not tasks) as bar:
        for frames in run_tasks(_write_shard, tasks, workers, ray=ray):
            bar.update(frames)
    return sum(path.stat().st_size for target in targets for path in target.iterdir())


class CachedFrames(Wrapped):
    """A dataset whose pictures come from a cache.

    `cameras` have to be in it, at `size` pixels; others come from the dataset.

    Raises:
        UserError: the cache lacks them, or was made of other files.
    """

    def __init__(self, source: Source, folder: Path, cameras: list[str], size: int):
        super().__init__(source)
        self._cached: dict[str, tuple[Path, int | None, int]] = {}
        for camera in cameras:
            target = _target(source, folder, camera, size)
            known = _read_manifest(target)
            shards = -(-source.num_frames // FRAMES_PER_SHARD)
            complete = known is not None and all(_shard(target, number).exists() for number in range(shards))
            if not complete:
                raise UserError(
                    f"{folder} does not hold camera {camera!r} of {source.root} at {size} px, or not all of it. Run: "
                    "pi0 data cache CONFIG"
                )
            content = {"files": _files(source, camera), "size": size, "frames": source.num_frames}
            assert known is not None
            if not _same(known, content | {"quality": known["quality"]}):
                raise UserError(f"{target} was made of other files than {source.root} has now. Run: pi0 data cache")
            self._cached[camera] = (target, known["quality"], size)
            self.features[camera] = {**source.features[camera], "shape": (size, size, 3)}

    def check_files(self, cameras: Sequence[str]) -> None:
        self.source.check_files([camera for camera in cameras if camera not in self._cached])

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        self.check_camera(camera)
        if camera not in self._cached:
            return self.source.images(camera, rows)
        target, quality, size = self._cached[camera]
        flat = np.asarray(rows).ravel()
        out = np.empty((len(flat), size, size, 3), np.uint8)
        for number in np.unique(flat // FRAMES_PER_SHARD).tolist():
            at = np.flatnonzero(flat // FRAMES_PER_SHARD == number)
            path = _shard(target, number)
            try:
                records = self.open_file(path, open_array_record, SHARDS_OPEN).read(
                    (flat[at] % FRAMES_PER_SHARD).tolist()
                )
            except Exception as error:  # the library has no narrower type
                raise BadEpisode(f"{path} is damaged ({error}). Remove it and run: pi0 data cache") from error
            for i, record in zip(at.tolist(), records, strict=True):
                out[i] = (
                    np.frombuffer(record, np.uint8).reshape(size, size, 3)
                    if quality is None
                    else decode_picture(record)
                )
        return out.reshape(*np.shape(rows), size, size, 3)


def _write_shard(
    source: Source, camera: str, start: int, end: int, size: int, quality: int | None, target: Path
) -> int:
    from array_record.python.array_record_module import ArrayRecordWriter

    with written(target) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        try:
            for first in range(start, end, DECODED_AT_ONCE):
                rows = np.arange(first, min(first + DECODED_AT_ONCE, end))
                for image in resize_with_pad(source.images(camera, rows), size):
                    writer.write(image.tobytes() if quality is None else _jpeg(image, quality))
            writer.close()
        except RuntimeError as error:  # of ArrayRecord, which has no other
            raise OSError(f"{target} cannot be written: {error}") from error
    return end - start


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "jpeg", quality=quality, subsampling=0)
    return buffer.getvalue()


def _target(source: Source, folder: Path, camera: str, size: int) -> Path:
    key = hashlib.sha256(repr((str(source.root.resolve()), source.episodes, camera, size)).encode()).hexdigest()[:12]
    return folder / f"{camera.replace('/', '_')}-{key}"


def _shard(target: Path, number: int) -> Path:
    return target / f"shard-{number:05d}.array_record"


def _files(source: Source, camera: str) -> dict[str, list[Any]]:
    """Size and time of change of each file that a camera's frames come from; the hash of its content comes third."""
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in source.picture_files(camera)}


def _same(known: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether what a cache was made of is what there is now; `content` gets the hashes that are known already."""
    if any(known[key] != content[key] for key in ("size", "quality", "frames")):
        return False
    if set(known["files"]) != set(content["files"]):
        return False
    for path, now in content["files"].items():
        before = known["files"][path]
        if before[:2] != now[:2] and (before[0] != now[0] or before[2:] != [_hash(Path(path))]):
            return False
        now += before[2:]
    return True


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(target: Path) -> dict[str, Any] | None:
    try:
        return read_json(target / "manifest.json", "the manifest of a cache")
    except (FileNotFoundError, ValueError):
        return None
