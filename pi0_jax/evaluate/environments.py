"""Where a simulator runs: in this process, in processes of this interpreter, or of one with packages of its own."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pi0_jax.data.files import user_cache
from pi0_jax.errors import UserError
from pi0_jax.evaluate.processes import Processes
from pi0_jax.evaluate.simulators import get_simulator, packages
from pi0_jax.evaluate.simulators.gym import Episodes

MARK = "packages.json"


def open_simulator(
    name: str, options: dict[str, Any] | None = None, python: str | Path | None = None, most: int | None = None
) -> Episodes:
    """The simulator of that name, or of that Python file, ready for episodes.

    Args:
        name: as in `get_simulator`.
        options: the simulator's.
        python: the interpreter that has its packages; None: this one, or what `install` made.
        most: processes at most; None: one per core.

    Raises:
        UserError: there is none, it has no such option, or its packages are not installed.
    """
    options = options or {}
    if python is None and (needed := packages(name)) and not _installed(needed):
        python = _own_python(name, needed)
        if python is None:
            raise UserError(
                f"the simulator {name} needs {needed[0]}. To install it in an environment of its own: pi0 env install "
                f"{name}. One that you have already is given with --env-python PATH."
            )
    elif python is None:
        simulator = get_simulator(name, **options)
        if simulator.threads:
            return simulator
    return Processes(name, options, str(python or sys.executable), most)


def install(name: str) -> Path:
    """Makes a virtual environment for a simulator, in the user's cache, and returns its interpreter.

    Raises:
        UserError: the simulator names no packages, or they cannot be installed.
    """
    needed = packages(name)
    if not needed:
        raise UserError(f"the simulator {name} names no packages of its own; it runs in this environment.")
    folder = _folder(name)
    (folder / MARK).unlink(missing_ok=True)
    python = folder / "bin" / "python"
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", *needed]):
        if code := subprocess.run(command, check=False).returncode:
            raise UserError(
                f"{' '.join(command)} ended with code {code}; what it printed says why. An environment made by other "
                f"means, with {' '.join(needed)}, is given with --env-python PATH."
            )
    (folder / MARK).write_text(json.dumps(needed))
    return python


def _folder(name: str) -> Path:
    return user_cache() / "envs" / Path(name).stem


def _own_python(name: str, needed: tuple[str, ...]) -> Path | None:
    """The interpreter that `install` made for these packages."""
    mark = _folder(name) / MARK
    if mark.is_file() and tuple(json.loads(mark.read_text())) == needed:
        return mark.parent / "bin" / "python"
    return None


def _installed(needed: tuple[str, ...]) -> bool:
    """Whether a simulator's own package, the first of those it needs, is in this interpreter."""
    try:
        importlib.metadata.version(re.split(r"[^\w.-]", needed[0], maxsplit=1)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
