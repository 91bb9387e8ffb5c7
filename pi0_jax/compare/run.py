"""Runs the cells of a comparison, each in a process of its own, several at a time where asked."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from pi0_jax.compare.cells import cells, folder, is_done, needs
from pi0_jax.compare.config import CompareConfig
from pi0_jax.errors import UserError


class CellFailed(UserError):
    """A cell's process ended with an error; the message names its log."""


@dataclasses.dataclass
class _Job:
    cell: tuple[int, str]
    process: subprocess.Popen
    begin: float
    cores: frozenset[int]
    log: Path


def run_cells(config: CompareConfig, command: list[str], jobs: int) -> None:
    """Runs all cells that are not done yet, each as soon as those it needs are.

    With several jobs the cores are divided between them; what was done before an interruption is not done again.

    Args:
        config: the comparison.
        command: a command line that runs one cell, but for `--cell SEED NAME`.
        jobs: cells at a time.

    Raises:
        CellFailed: a cell ended with an error. Those running beside it are stopped; a later call resumes them.
    """
    everything = cells(config)
    waiting = [cell for cell in everything if not is_done(config, *cell)]
    print(f"{len(everything) - len(waiting)} of {len(everything)} cells are done; {config.run_dir}", flush=True)
    running: list[_Job] = []
    free = _divided_cores(max(1, jobs))
    try:
        while waiting or running:
            ready = [cell for cell in waiting if all(is_done(config, *other) for other in needs(config, *cell))]
            alone = len(ready) == 1 and not running
            for cell in ready[: len(free)]:
                waiting.remove(cell)
                running.append(_start(config, command, cell, free.pop(), pinned=not alone))
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.cores)
                _check(job)
                done, seconds = len(everything) - len(waiting) - len(running), time.monotonic() - job.begin
                print(f"[{done}/{len(everything)}] seed {job.cell[0]}, {job.cell[1]}: {seconds:.0f} s", flush=True)
            time.sleep(0.2)
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()


def _divided_cores(jobs: int) -> list[frozenset[int]]:
    """The cores of this process for each job; empty where they cannot be chosen."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [frozenset(cores[i::jobs] if len(cores) >= jobs else cores) for i in range(jobs)]


def _start(
    config: CompareConfig, command: list[str], cell: tuple[int, str], cores: frozenset[int], *, pinned: bool
) -> _Job:
    """Starts a cell on its share of the cores; where it runs alone, on all."""
    root, (seed, name) = Path(config.run_dir), cell
    log = root / "logs" / f"{folder(config, *cell).relative_to(root)}.txt".replace("/", "-")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pi0_jax.cli", *command, "--cell", str(seed), name],
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores and pinned else None,
        )
    return _Job(cell, process, time.monotonic(), cores, log)


def _check(job: _Job) -> None:
    if job.process.returncode != 0:
        lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
        raise CellFailed(
            f"seed {job.cell[0]}, {job.cell[1]} failed with exit code {job.process.returncode}; its log is {job.log} "
            "and ends:\n  "
            + "\n  ".join(lines[-3:])
            + "\nThe cells that are done stay; the same command goes on from there."
        )
