"""Experiment files: Python that ends in `config = ...`."""

from __future__ import annotations

import dataclasses
import difflib
import runpy
import traceback
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def load_config(path: str | Path, kind: type[Config]) -> Config:
    """Executes a Python file and returns its `config`.

    Args:
        path: the file.
        kind: what its `config` has to be.

    Raises:
        FileNotFoundError: no such file; the message lists those beside it.
        ValueError: the file fails, defines no `config`, one of another type, or one with a value that is none of those
            its field may have.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; expected a config, a Python file such as configs/tabletop.py.")
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
    _check(config, kind, f"{path}: config")
    return config


def _check(value: Any, hint: Any, name: str) -> None:
    """Raises ValueError unless words are among those that a field may have, and groups of fields are of their class."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    classes = tuple(kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type))
    if words and value not in words:
        close = difflib.get_close_matches(str(value), [str(word) for word in words], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{name} is {value!r}{hint}; expected one of {words}.")
    if classes and not isinstance(value, classes):
        raise ValueError(f"{name} is {value!r}; expected {' or '.join(f'{kind.__name__}(...)' for kind in classes)}.")
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            _check(getattr(value, field.name), hints[field.name], f"{name}.{field.name}")
    elif isinstance(value, tuple) and typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        for i, entry in enumerate(value):
            _check(entry, typing.get_args(hint)[0], f"{name}[{i}]")
