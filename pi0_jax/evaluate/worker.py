"""A process that holds environments, and does what messages on its standard input say; `processes` starts it.

Everything here runs in the simulator's interpreter, which may have neither this package nor JAX. A GL context belongs
to the thread that made it, and there is one thread.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from pi0_jax.errors import UserError
from pi0_jax.evaluate.demonstrate import Noise, demonstrate
from pi0_jax.evaluate.gl import choose_gl, gl_advice
from pi0_jax.evaluate.messages import receive, send
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.evaluate.simulators.gym import Episode, Simulator

START = """
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path]
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("pi0_jax", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pi0_jax"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from pi0_jax.evaluate.worker import main
main()
"""
"""What the other interpreter is told to do, with the folder of this package as its argument: this package alone is
added, not what else lies beside it."""


class Worker:
    """Environments of one simulator. Its public methods are what messages can ask for."""

    _simulator: Simulator

    def __init__(self) -> None:
        self._episodes: dict[int, Episode] = {}

    def open(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        self._simulator = made = get_simulator(name, **options)
        return {name: getattr(made, name) for name in ("robot", "fps", "tasks", "per_task", "modes")}

    def start(self, number: int, index: int, seed: int, split: str, attempt: int) -> list[Any]:
        self._episodes[number] = episode = self._simulator.start(index, seed, split, attempt)
        return [episode.task, episode.seed]

    def observe(self, number: int) -> Any:
        return self._episodes[number].observe()

    def step(self, number: int, action: Any) -> tuple[bool, bool, str | None]:
        episode = self._episodes[number]
        return *episode.step(action), episode.mode

    def picture(self, number: int) -> Any:
        return self._episodes[number].picture()

    def close(self, number: int) -> None:
        self._episodes.pop(number).close()

    def demonstrate(self, number: int, seed: int, split: str, noise: dict[str, Any], cameras: dict[str, str]) -> Any:
        return demonstrate(self._simulator, number, seed, split, Noise(**noise), cameras)


def main() -> None:
    """Answers messages until there are no more: ["", result], or [message, None] of an error."""
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what simulators print is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    choose_gl()
    worker = Worker()
    while True:
        try:
            method, *arguments = receive(asked)
        except EOFError:
            return
        try:
            answer = ["", getattr(worker, method)(*arguments)]
        except UserError as error:
            answer = [str(error), None]
        except ModuleNotFoundError as error:
            answer = [f"the simulator needs {error.name}, which {sys.executable} does not have.", None]
        except Exception as error:
            trace = traceback.format_exc()
            answer = [f"{type(error).__name__}: {error}.{gl_advice(trace) or chr(10) + trace}", None]
        send(answers, answer)
