"""Files and folders are written under other names, and renamed into place when they are whole.

Such a name tells the machine and the process that writes. A process that is killed leaves what it wrote; the next one
that writes the same file removes it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Gives a new name to write to, which becomes `path` at the end; after an error nothing is left of it.

    Raises:
        OSError: what came up, with the name of the file where the system did not say it.
    """
    partial = partial_path(path)
    try:
        yield partial
        partial.rename(path)
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        _remove(partial)


def partial_path(path: Path) -> Path:
    """A new, hidden name beside `path`, after removing what processes of this machine left there that are no more."""
    machine = re.sub(r"\W", "-", platform.node())
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.{machine}\.(\d+)\.\w+\.partial", left.name)
        if match and not lives(int(match[1])):
            _remove(left)
    return path.with_name(f".{path.name}.{machine}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")


def lives(process: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
