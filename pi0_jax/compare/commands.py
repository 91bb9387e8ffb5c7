"""`pi0 compare`; its dataclass is its command line."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from pi0_jax.compare.cells import cells, run_cell
from pi0_jax.compare.config import Changes, CompareConfig
from pi0_jax.compare.report import write_comparison
from pi0_jax.compare.run import run_cells
from pi0_jax.config_file import load_config
from pi0_jax.errors import require_package


@dataclasses.dataclass(frozen=True)
class Compare(Changes):
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
    jobs: int = 1
    """Cells at a time, the cores divided between them."""
    cell: tuple[int, str] | None = None
    """Run one cell alone, in this process: its seed, and the contender's name or backbone."""

    def command(self) -> list[str]:
        """The command line that runs one cell, but for `--cell SEED NAME`."""
        words = ["compare", str(self.config), *(["--quick"] if self.quick else [])]
        for field in dataclasses.fields(Changes):
            value = getattr(self, field.name)
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
        return words


def compare(args: Compare) -> None:
    """Runs `pi0 compare`.

    Raises:
        UserError, FileNotFoundError: no such file or contender, or no demonstrations.
        CellFailed: a cell ended with an error.
    """
    require_package("matplotlib", "report", "the comparison's report")
    config = configure(load_config(args.config, CompareConfig), args)
    if args.cell is not None:
        run_cell(config, *args.cell)
        return
    for path, flags in ((config.train.data.path, ""), (config.train.data.validation_path, " --split validation")):
        if path is None or not Path(path).is_dir():
            raise FileNotFoundError(
                f"a comparison needs demonstrations in {path}. Record them first, as the head of {args.config} says: "
                f"pi0 record {path} --env {config.env}{flags}"
            )
    begin = time.monotonic()
    run_cells(config, args.command(), args.jobs)
    path = write_comparison(config)
    print(f"\n{len(cells(config))} cells, {(time.monotonic() - begin) / 60:.1f} minutes now; report: {path}")


def configure(config: CompareConfig, args: Compare) -> CompareConfig:
    """The configuration with what the command line changes; what that leaves open is as `quick` says, if it asks so."""
    if not args.quick:
        return config.changed(args)
    chosen: dict[str, Any] = {"run_dir": config.quick.run_dir or f"{config.run_dir}-quick"}
    for field in dataclasses.fields(Changes):
        if (value := getattr(args, field.name)) is not None:
            chosen[field.name] = value
    return config.changed(dataclasses.replace(config.quick, **chosen))
