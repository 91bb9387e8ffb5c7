"""Files and folders are written under another name beside their own, and renamed when they are complete.

That name has the machine and the process that writes. A killed process leaves what it wrote; the next one that writes
the same file removes it, or brings back the folder that was about to be replaced.
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
def written(path: Path, *, replace_folder: bool = False) -> Iterator[Path]:
    """Gives a new name to write to, which becomes `path` at the end; after an error nothing is left of it.

    A file at `path` is replaced; a folder that is not empty only with `replace_folder`. An OSError has the name of the
    file where the system did not say it.
    """
    partial = partial_path(path)
    try:
        yield partial
        put_in_place(partial, path, replace_folder=replace_folder)
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        remove(partial)


def partial_path(path: Path) -> Path:
    """A new, hidden name beside `path`, after clearing what dead processes of this machine left there."""
    machine = re.sub(r"\W", "-", platform.node())
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        match = re.fullmatch(rf"\.{re.escape(path.name)}\.{machine}\.(\d+)\.\w+\.(partial|replaced)", left.name)
        if match and not lives(int(match[1])):
            if match[2] == "replaced" and not path.exists():
                left.rename(path)
            else:
                remove(left)
    return path.with_name(f".{path.name}.{machine}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")


def put_in_place(partial: Path, path: Path, *, replace_folder: bool = False) -> None:
    """Renames a name of `partial_path` to `path`; see `written`."""
    if not (replace_folder and path.is_dir()):
        partial.replace(path)
        return
    old = partial.with_suffix(".replaced")
    path.rename(old)
    partial.rename(path)
    remove(old)


def remove(path: Path) -> None:
    """Deletes a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
