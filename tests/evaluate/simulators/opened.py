"""Simulators with packages of their own, which tests find in this interpreter or in the folder PI0_ENVS."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pi0_jax.errors import UserError
from pi0_jax.evaluate.environments import open_simulator


def python_of(name: str) -> Path | None:
    """The interpreter of an environment in that folder."""
    python = Path(os.environ.get("PI0_ENVS", "none")) / Path(name).stem / "bin" / "python"
    return python if python.is_file() else None


def opened(name: str, options: dict[str, Any]) -> Iterator[Any]:
    """The simulator in one process, which ends with the fixture; skips where nothing has its packages."""
    try:
        simulator: Any = open_simulator(name, options, python_of(name), most=1)
    except UserError as error:
        pytest.skip(f"{error} Tests find environments in the folder PI0_ENVS.")
    yield simulator
    simulator.close()
