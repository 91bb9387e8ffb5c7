"""Simulators in other processes, which may be of other interpreters: several processes with several environments each.

A batch of episodes is spread over them; each executes one message after another.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import pi0_jax
from pi0_jax.data.raw import RawObservation
from pi0_jax.errors import UserError
from pi0_jax.evaluate import messages
from pi0_jax.evaluate.demonstrate import Demonstration, Noise
from pi0_jax.evaluate.simulators import locate
from pi0_jax.evaluate.worker import START

AHEAD = 4
"""Demonstrations per process that are recorded before the first of them is asked for."""


class Process:
    """One process with environments (`worker.Worker`); any thread may call it, and waits for its turn."""

    def __init__(self, name: str, options: dict[str, Any], python: str):
        self.name, self.running = Path(name).stem, 0
        """`running`: episodes that it has."""
        self._python, self._lock = python, threading.Lock()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        command, pipe = [python, "-c", START, str(Path(pi0_jax.__file__).parent)], subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log)
        except OSError as error:
            raise UserError(f"the simulator's interpreter {python} cannot be run: {error}.") from error
        self.description: dict[str, Any] = self.call("open", locate(name), options)

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method of `worker.Worker`.

        Raises:
            UserError: it failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                messages.send(self._process.stdin, [method, *arguments])
                error, result = messages.receive(self._process.stdout)
            except (EOFError, OSError):
                code = self._process.wait()
                raise UserError(
                    f"the process of the simulator {self.name} ended with code {code} ({self._python}). It last "
                    f"said:\n{self._last_words()}"
                ) from None
        if error:
            raise UserError(error if method != "open" or self.name in error else f"the simulator {self.name}: {error}")
        return result

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-15:])


class Processes:
    """A simulator whose environments live in processes (`gym.Episodes`); they end with this one, or by `close`.

    `name` and `options` are those of `get_simulator`, `python` the interpreter that has the simulator's packages,
    `most` the number of processes.

    Raises:
        UserError: the interpreter or the simulator cannot be used.
    """

    def __init__(self, name: str, options: dict[str, Any], python: str = sys.executable, most: int | None = None):
        self.name, self._most = Path(name).stem, most or os.cpu_count() or 1
        self._start = (name, options, python)
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._processes = [Process(*self._start)]
        found = self._processes[0].description
        self.robot: str = found["robot"]
        self.fps: int = found["fps"]
        self.tasks: tuple[str, ...] = tuple(found["tasks"])
        self.per_task: int = found["per_task"]
        self.modes: tuple[str, ...] = tuple(found["modes"])

    def start(self, index: int, seed: int, split: str = "evaluation", attempt: int = 0) -> RemoteEpisode:
        """As `Simulator.start`, in the process with the fewest episodes."""
        with self._lock:
            process = min(self._processes, key=lambda each: each.running)
            if process.running and len(self._processes) < self._most:
                process = Process(*self._start)
                self._processes.append(process)
            process.running += 1
            number = next(self._numbers)
        return RemoteEpisode(process, number, index, seed, split, attempt)

    def demonstrations(
        self, count: int, seed: int, split: str, noise: Noise, cameras: dict[str, str]
    ) -> Iterator[Demonstration]:
        """The first `count` demonstrations of a split, in order, recorded by as many processes as there may be."""
        free = deque(self._processes)
        lock = threading.Lock()

        def record(number: int) -> Demonstration:
            with lock:
                if not free:
                    free.append(Process(*self._start))
                    self._processes.append(free[-1])
                process = free.popleft()
            try:
                how = (dataclasses.asdict(noise), cameras)
                found = Demonstration(*process.call("demonstrate", number, seed, split, *how))
                return found._replace(subtasks=tuple(found.subtasks))  # a tuple arrives as a list
            finally:
                free.append(process)

        with concurrent.futures.ThreadPoolExecutor(self._most) as threads:
            ahead: deque[concurrent.futures.Future[Demonstration]] = deque()
            try:
                for number in range(count):
                    if len(ahead) == AHEAD * self._most:
                        yield ahead.popleft().result()
                    ahead.append(threads.submit(record, number))
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.close()
        self._processes.clear()


class RemoteEpisode:
    """An episode in a process (`gym.Running`)."""

    def __init__(self, process: Process, number: int, *how: Any):
        self._process, self._number = process, number
        self.task, self.seed = process.call("start", number, *how)
        self.mode: str | None = None

    def observe(self) -> RawObservation:
        return self._process.call("observe", self._number)

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        over, success, self.mode = self._process.call("step", self._number, action)
        return over, success

    def picture(self) -> np.ndarray:
        return self._process.call("picture", self._number)

    def close(self) -> None:
        self._process.call("close", self._number)
        self._process.running -= 1
