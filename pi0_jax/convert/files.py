"""JSON files beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pi0_jax.errors import UserError

RECORD = "conversion.json"
"""Name of the record beside converted weights: what was converted from what, and how it was checked."""


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError with its name if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged or cut short, it is not JSON: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that people can read, too."""
    path.write_text(json.dumps(content, indent=2) + "\n")
