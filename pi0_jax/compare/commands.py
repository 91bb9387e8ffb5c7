"""What `pi0 compare` does; its dataclass is its command line."""

from __future__ import annotations

import dataclasses
import difflib
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from pi0_jax.compare.cells import cells, run_cell
from pi0_jax.compare.report import write_comparison
from pi0_jax.compare.run import run_cells
from pi0_jax.config import CompareConfig
from pi0_jax.config_file import load_config


@dataclasses.dataclass(frozen=True)
class Compare:
    """Trains and measures kinds of policies alike, and writes one page and one JSON of how they compare.

    Every cell, a contender with a seed, is a process of its own with its log beside the runs; the same command goes on
    where an interruption left off, and writes the page anew from what is there.

    Examples:

        pi0 compare configs/compare_tabletop.py --jobs 2

        pi0 compare configs/compare_tabletop.py --quick --jobs 2
    """

    config: Annotated[Path, tyro.conf.Positional]
    """Python file that defines `config`, a CompareConfig."""
    quick: bool = False
    """A small form, as the file's `quick` says."""
    seeds: tuple[int, ...] | None = None
    """Training seeds."""
    contenders: tuple[str, ...] | None = None
    """Names of those to compare; all by default."""
    num_steps: int | None = None
    """Updates of each contender."""
    backbone_steps: int | None = None
    """Updates of the backbone that all start from."""
    episodes: int | None = None
    """Episodes in closed loop for each measurement."""
    run_dir: str | None = None
    """Folder for runs, logs, compare.html and compare.json."""
    jobs: int = 1
    """Cells at a time, the cores divided between them."""
    cell: tuple[int, str] | None = None
    """Run one cell alone, in this process: its seed, and the contender's name or backbone."""


def compare(args: Compare) -> None:
    """Runs `pi0 compare`.

    Raises:
        ValueError, FileNotFoundError: no such file or contender, or no demonstrations.
        CellFailed: a cell ended with an error.
    """
    config = configure(load_config(args.config, CompareConfig), args)
    if args.cell is not None:
        run_cell(config, *args.cell)
        return
    for path in (config.train.data.path, config.train.data.validation_path):
        if path is None or not Path(path).is_dir():
            raise FileNotFoundError(
                f"a comparison needs demonstrations in {path}; record them first (make compare does)."
            )
    begin = time.monotonic()
    command = ["compare", str(args.config), *(["--quick"] if args.quick else [])]
    for name in ("seeds", "contenders", "num_steps", "backbone_steps", "episodes", "run_dir"):
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    run_cells(config, command, args.jobs)
    path = write_comparison(config)
    print(f"\n{len(cells(config))} cells, {(time.monotonic() - begin) / 60:.1f} minutes now; report: {path}")


def configure(config: CompareConfig, args: Compare) -> CompareConfig:
    """The configuration with what the command line says set otherwise.

    Raises:
        ValueError: no such contender.
    """
    wanted: dict[str, Any] = dict(config.quick) if args.quick else {}
    if args.quick:
        wanted["run_dir"] = f"{config.run_dir}-quick"
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    wanted |= {name: value for name, value in given.items() if value is not None}
    names = wanted.get("contenders", tuple(config.contenders))
    for name in names:
        if name not in config.contenders:
            close = difflib.get_close_matches(name, config.contenders, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"there is no contender {name!r}; there are {', '.join(config.contenders)}.{hint}")
    contenders = {name: config.contenders[name] for name in config.contenders if name in names}
    lacking = {c.teacher for c in contenders.values() if c.teacher is not None} - set(contenders)
    if lacking:
        raise ValueError(f"the contender {lacking.pop()!r} is another one's teacher; name it too.")
    if "evaluations" in wanted:
        few = wanted["evaluations"]
        contenders = {
            name: dataclasses.replace(c, evaluations=tuple(n for n in c.evaluations if n in few) or c.evaluations)
            for name, c in contenders.items()
        }
    train = dataclasses.replace(config.train, num_steps=wanted.get("num_steps", config.train.num_steps))
    kept = {name: wanted[name] for name in ("seeds", "backbone_steps", "episodes", "run_dir") if name in wanted}
    return dataclasses.replace(config, train=train, contenders=contenders, **kept)
