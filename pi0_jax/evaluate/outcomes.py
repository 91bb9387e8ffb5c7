"""Outcomes of an evaluation as they come, one line of JSON per episode, with which an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pi0_jax.errors import UserError
from pi0_jax.evaluate.rollout import Outcome


class OutcomeFile:
    """A file whose first line says what is evaluated and how, and whose others are episodes.

    Args:
        path: the file.
        about: what the outcomes depend on, as JSON.
        resume: whether to go on with the file, if there is one; a new one begins otherwise.

    Raises:
        UserError: the file is about something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, resume: bool):
        self.path = path
        self.done: dict[int, Outcome] = {}
        """Outcomes that were in the file, by index."""
        about = json.loads(json.dumps(about, default=repr))
        lines = path.read_text().splitlines(keepends=True) if resume and path.is_file() else []
        complete = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
        if complete:
            self._check(json.loads(complete[0]), about)
            for row in map(json.loads, complete[1:]):
                self.done[row["index"]] = Outcome(**row)
            path.write_text("".join(complete))
        else:
            path.write_text(json.dumps(about) + "\n")

    def add(self, outcome: Outcome) -> None:
        """Writes the line of an episode."""
        names = ("index", "task", "seed", "prompt", "success", "num_steps", "mode")
        with self.path.open("a") as file:
            file.write(json.dumps({name: getattr(outcome, name) for name in names}) + "\n")

    def _check(self, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        names = [name for name in {**found, **about} if found.get(name) != about.get(name)]
        if names:
            there = ", ".join(f"{name} {found.get(name)!r} there and {about.get(name)!r} now" for name in names)
            raise UserError(f"{self.path} is of another evaluation: {there}. Without --resume it is begun anew.")
