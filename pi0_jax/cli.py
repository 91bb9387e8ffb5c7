"""The command line: `pi0 train`, `pi0 infer` and the others in `COMMANDS`. Each is imported when it is called.

What a user can cause is printed as one message without a traceback, and the exit code is 1; a mistyped command or flag
gives 2, Ctrl-C 130, and SIGTERM 0 where the state was saved. PI0_TRACEBACK=1 shows tracebacks too, PI0_LOG=debug more
of the log.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import logging
import os
import re
import shlex
import sys
import typing
from collections.abc import Iterable

import tyro
from tqdm import tqdm

from pi0_jax.checkpoint import CheckpointError, Found, load_assets
from pi0_jax.config import MeshConfig, TrainConfig
from pi0_jax.config_file import load_config, parse
from pi0_jax.errors import UserError, did_you_mean

COMMANDS = {
    "train": ("training", "train a policy: pi0 train configs/tabletop.py --batch-size 64"),
    "infer": ("evaluate", "run a policy on an observation or in a simulator: pi0 infer runs/tabletop --env tabletop"),
    "evaluate": ("evaluate", "run a policy in closed loop: pi0 evaluate runs/tabletop --episodes 200 --seed 1"),
    "report": ("evaluate", "evaluate a run in closed loop and write its report: pi0 report runs/tabletop"),
    "diagnose": ("diagnose", "say what a policy learned and what it uses, without a robot: pi0 diagnose runs/mine"),
    "serve": ("serving", "serve a policy to robots, as openpi does: pi0 serve runs/tabletop"),
    "export": ("inference", "write programs and weights for machines without this package: pi0 export RUN DIR"),
    "plan": ("plan", "say what training or acting takes on devices not at hand: pi0 plan CONFIG --topology h100:8"),
    "reflow": ("training", "straighten a policy's flow, for fewer steps: pi0 reflow runs/tabletop runs/straight"),
    "compare": ("compare", "train and compare kinds of policies: pi0 compare configs/compare_tabletop.py"),
    "record": ("evaluate", "record demonstrations in a simulator: pi0 record data/tabletop"),
    "env": ("evaluate", "install a simulator's packages in an environment of their own: pi0 env install metaworld"),
    "convert": ("convert", "turn openpi, LeRobot or big_vision weights into ours, and back: pi0 convert SRC DST"),
    "inspect": ("convert", "say what a checkpoint of any format is: pi0 inspect PATH"),
    "diff": ("convert", "compare two checkpoints leaf by leaf: pi0 diff A B"),
    "data": ("data", "look at, check, convert and prepare demonstrations: pi0 data stats configs/mine.py"),
}
"""Command to the subpackage whose `commands` module has its function, and what it does."""
OF_AN_EXPERIMENT = {"train": ("training.loop", "run"), "plan": ("plan.commands", "plan")}
"""Commands that take a config file to be changed by flags: module and function."""

CONFIG_HELP = """\
usage: pi0 {command} CONFIG [--sharding FILE] [--FIELD VALUE ...]

  pi0 {command} configs/tabletop.py --optim.peak-lr 3e-4

CONFIG is a Python file that defines `config`; pi0 {command} CONFIG --help lists its fields.
FILE is one whose `config` is a `MeshConfig`, as those in configs/sharding/ have."""
PLAN_HELP = """

  pi0 plan configs/mine.py --topology v5e:4x4 --sharding configs/sharding/fsdp.py
  pi0 plan configs/mine.py --topology h100:1 --largest-batch
  pi0 plan runs/mine --sample --cameras 2 --topology rtx4090:1

Compiles the update of `pi0 train` with the same CONFIG and flags, and prints for each device: bytes, work, traffic,
kernels, a bound of the time, and the largest costs with the lines of code that they come from; where it does not fit,
the nearest flags that do. Nothing is allocated, and no demonstrations are read.

--topology NAME:SHAPE is a TPU slice (v4, v5e, v5p, v6e; needs libtpu, extra tpu) or GPUs (h100:8, h200, a100, l40s,
rtx4090, rtx5090, b200, thor; extra cuda12 has their compiler, else memory is an estimate), there or not; left out, it
means the devices of this machine.
--largest-batch looks for the largest --batch-size that fits, by compiling a few, and prints each.
--sample compiles the program that computes a chunk of actions, of a config or a checkpoint's folder, for one device.
--cameras N: with so many of the model's cameras; left out: those of the robot. --chunks N: for so many robots at
once."""


def main(args: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        args: the command and its arguments; None: those of the process.
    """
    args = sys.argv[1:] if args is None else args
    summaries = ((name, text) for name, (_, text) in COMMANDS.items())
    if (code := _usage("pi0", args, summaries)) is not None:
        return code
    command, *flags = args
    _set_up_logging()
    try:
        return _data(flags) if command == "data" else _run(command, flags)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "resume" in vars(error):  # the run was interrupted
            kept = [flag for flag in flags if flag not in ("--resume", "--overwrite")]
            vars(error)["resume"] = f"pi0 {command} {shlex.join([*kept, '--resume'])}"
        for_the_user = isinstance(error, UserError | OSError) or hasattr(error, "exit_code")
        if os.environ.get("PI0_TRACEBACK") or not for_the_user:
            raise
        advice = _advice(error.found) if isinstance(error, CheckpointError) else ""
        print(f"\npi0 {command}: {re.sub(r'^.Errno -?[0-9]+. ', '', str(error))}{advice}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _usage(prog: str, args: list[str], summaries: Iterable[tuple[str, str]]) -> int | None:
    """Prints which commands there are, where that is asked for or the first argument is none; the exit code then."""
    texts = dict(summaries)
    if args and args[0] in texts:
        return None
    usage = f"usage: {prog} COMMAND ...\n\n" + "\n".join(f"  {name:8} {text}" for name, text in texts.items())
    usage += f"\n\n{prog} COMMAND --help says more."
    if args and args[0] not in ("-h", "--help"):
        print(f"{prog}: there is no command {args[0]!r}.{did_you_mean(args[0], texts)}\n\n{usage}", file=sys.stderr)
        return 2
    print(usage)
    return 0 if args else 2


def _run(command: str, args: list[str]) -> int:
    """A command is a function of the experiment of a file, or of the dataclass of its flags."""
    if command not in OF_AN_EXPERIMENT:
        function = getattr(importlib.import_module(f"pi0_jax.{COMMANDS[command][0]}.commands"), command)
        function(_flags(next(iter(typing.get_type_hints(function).values())), args, f"pi0 {command}"))
        return 0
    if not args or args[0].startswith("-"):
        print(CONFIG_HELP.format(command=command) + (PLAN_HELP if command == "plan" else ""))
        return 0 if args[:1] in (["-h"], ["--help"]) else 2
    experiment, how = _experiment(command, args)  # is read before anything heavy is imported
    module, name = OF_AN_EXPERIMENT[command]
    getattr(importlib.import_module(f"pi0_jax.{module}"), name)(*experiment, **how)
    return 0


def _experiment(command: str, args: list[str]) -> tuple[tuple[typing.Any, ...], dict[str, typing.Any]]:
    """Arguments of the command's function: the experiment of CONFIG and flags, and flags of the command itself."""
    parser = argparse.ArgumentParser(prog=f"pi0 {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--sharding")
    if command == "plan":
        parser.add_argument("--topology")
        parser.add_argument("--sample", action="store_true")
        parser.add_argument("--cameras", type=int)
        parser.add_argument("--chunks", type=int, default=1)
        parser.add_argument("--largest-batch", action="store_true")
    own, flags = parser.parse_known_args(args)
    sample = command == "plan" and own.sample
    if sample and not own.config.endswith(".py"):
        config = TrainConfig(policy=load_assets(own.config).policy)
    else:
        config = load_config(own.config, TrainConfig)
    if own.sharding is not None:
        config = dataclasses.replace(config, mesh=load_config(own.sharding, MeshConfig))
    prog = f"pi0 {command} {own.config}"
    example = f"Fields of {own.config}, which flags set anew: {prog} --optim.peak-lr 3e-4 --batch-size 64"
    config = parse(config, flags, prog=prog, description=example)
    if command != "plan":
        return (config,), {}
    if not sample and (own.cameras is not None or own.chunks != 1):
        raise UserError(
            "--cameras and --chunks are of chunks of actions: pi0 plan CONFIG --sample --cameras 2 --chunks 8."
        )
    if sample and own.largest_batch:
        raise UserError("--largest-batch is of updates: pi0 plan CONFIG --topology h100:1 --largest-batch.")
    how = {"sample": sample, "cameras": own.cameras, "chunks": own.chunks, "largest_batch": own.largest_batch}
    return (config, own.topology), how


def _flags(kind: type, args: list[str], prog: str, *, fields: bool = False) -> typing.Any:
    """Flags as a dataclass, whose docstring is the help; with `fields` also the arguments that are no flag of it."""
    text = (inspect.getdoc(kind) or "").replace("\n\n    ", "\n    ")
    return tyro.cli(kind, args=args, prog=prog, description=text, return_unknown_args=fields)


def _data(args: list[str]) -> int:
    """`pi0 data SUBCOMMAND`: see `pi0_jax.data.commands`."""
    from pi0_jax.data.commands import SUBCOMMANDS

    summaries = ((name, str(kind.__doc__).splitlines()[0]) for name, (kind, _) in SUBCOMMANDS.items())
    if (code := _usage("pi0 data", args, summaries)) is not None:
        return code
    kind, function = SUBCOMMANDS[args[0]]
    prog = f"pi0 data {args[0]}"
    flags, fields = _flags(kind, args[1:], prog, fields=True)
    path = getattr(flags, "config", None)
    if fields and (path is None or not any("." in each for each in fields if each.startswith("--"))):
        _flags(kind, args[1:], prog)  # refuses what is neither a flag nor a field
    config = None if path is None else load_config(path, TrainConfig)
    if config is not None and fields:
        config = parse(config, fields, prog=f"{prog} {path}", description="Fields of the config.")
    function(flags, config)
    return 0


def _advice(found: Found | None) -> str:
    """What to do with a path that is no checkpoint of ours."""
    if found is not None and found.convertible:
        return f"\nTo convert it: pi0 convert {found.path} TARGET"
    return " It belongs in --data.path." if found is not None and found.kind == "dataset" else ""


class _AboveTheBar(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _set_up_logging() -> None:
    logging.basicConfig(handlers=[_AboveTheBar()], format="%(message)s")
    logging.getLogger("pi0_jax").setLevel(os.environ.get("PI0_LOG", "info").upper())
    # Orbax and its event loop print the tracebacks of errors that reach the user as exceptions anyway.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
