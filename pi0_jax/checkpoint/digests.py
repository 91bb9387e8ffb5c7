"""Size and CRC-32 of every file of a step, written with it, to tell later whether it is still what was written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from pi0_jax.checkpoint.locate import CheckpointError, Found, is_complete, previous_step, read

_FILE = "digests.json"


def write_digests(step: Path) -> None:
    """Writes the digests of all files in the folders of a step; files beside these folders are not read by anyone."""
    files = sorted(path for path in step.glob("*/**/*") if path.is_file())
    content = {str(path.relative_to(step)): _digest(path) for path in files}
    (step / _FILE).write_text(json.dumps(content, indent=2) + "\n")


def verify(step: str | Path, shard: tuple[int, int] = (0, 1), only: tuple[str, ...] = ()) -> None:
    """Reads the files of a checkpoint and compares them with what was written.

    `shard` (i, n) reads every n-th file from the i-th on, so that n processes share the work; `only` names folders of
    the step to read, empty for all.

    Raises:
        CheckpointError: a file is missing or has changed; the message names it, and the checkpoint before this one.
            In one that was written before there were digests, the check is only that the files of a policy are there.
    """
    step = Path(step)
    if not is_complete(step):
        raise CheckpointError(Found("incomplete", step).describe())
    index, count = shard
    for path, size, crc in list(_recorded(step))[index::count]:
        if not only or path.relative_to(step).parts[0] in only:
            _require(path, size, step, crc)


def require_files(folder: Path) -> None:
    """Raises CheckpointError if a file of one folder of a step is missing or has another size, without reading them."""
    for path, size, _ in _recorded(folder.parent):
        if path.is_relative_to(folder):
            _require(path, size, folder.parent)


def _recorded(step: Path) -> Iterator[tuple[Path, int, int]]:
    """Path, size and CRC-32 of each file as written; none in a step without digests."""
    content = read(step, _FILE) if (step / _FILE).exists() else {}
    return ((step / name, size, crc) for name, (size, crc) in content.items())


def _require(path: Path, size: int, step: Path, crc: int | None = None) -> None:
    """Raises CheckpointError where a file is missing or has another size, or CRC-32 if one is given."""
    there = path.is_file()
    if not there or path.stat().st_size != size or (crc is not None and _digest(path)[1] != crc):
        problem = "not what was written" if there else "missing"
        raise CheckpointError(f"{step} is damaged: {path} is {problem}. {previous_step(step)}")


def _digest(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
