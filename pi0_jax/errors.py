"""Errors that a user can cause, and what their messages share.

Raise `UserError`, or a subclass, where the user can mend the cause: the command line prints its message without a
traceback. `assert` is for what only this package can cause.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(ValueError):
    """An error whose message says what came, what was expected, and the way out.

    A class may set `exit_code`, with which the command line ends; 1 otherwise.
    """

    exit_code: int = 1


def did_you_mean(name: object, names: Iterable[object], cutoff: float = 0.6) -> str:
    """A sentence, with a space before it, that suggests the nearest of some names.

    Args:
        name: what the user wrote.
        names: what the user could have written.
        cutoff: how alike the suggestion must be, from 0 (anything) to 1 (the same).

    Returns:
        " Did you mean 'x'?", or "" where nothing is near.
    """
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first names with commas between them, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def require_package(name: str, extra: str, purpose: str = "this") -> Any:
    """Imports a module of an optional dependency.

    Args:
        name: the module's dotted name.
        extra: the extra of pi0_jax that installs it, in a clone of the repository.
        purpose: subject of the error's sentence, such as "exporting a policy".

    Raises:
        UserError: it is not installed, or cannot be imported; the message names the extra.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        why = "which is not installed" if absent else f"which cannot be imported ({error})"
        raise UserError(f"{purpose} needs {package}, {why}: pip install -e '.[{extra}]'.") from error
