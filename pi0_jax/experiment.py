"""Experiment files: Python that ends in `config = ...`."""

from __future__ import annotations

import difflib
import runpy
import traceback
from pathlib import Path
from typing import TypeVar

Config = TypeVar("Config")


def load_config(path: str | Path, kind: type[Config]) -> Config:
    """Executes a Python file and returns its `config`.

    Args:
        path: the file.
        kind: what its `config` has to be.

    Raises:
        FileNotFoundError: no such file; the message lists those beside it.
        ValueError: the file fails, defines no `config`, or one of another type.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        names = sorted(str(p) for p in folder.glob("*.py"))
        close = difflib.get_close_matches(str(folder / f"{path.stem}.py"), names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise FileNotFoundError(f"there is no config {path}. {folder} has: {', '.join(names) or 'none'}.{hint}")
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f"line {lines[-1]} of {path}" if lines else str(path)
        raise ValueError(f"{where} fails with {type(error).__name__}: {error}") from error
    config = namespace.get("config")
    if not isinstance(config, kind):
        found = "defines no `config`" if config is None else f"has a `config` of type {type(config).__name__}"
        raise ValueError(
            f"{path} {found}; it has to end in `config = {kind.__name__}(...)`. See the files in configs/."
        )
    return config
