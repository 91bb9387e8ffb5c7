"""The command line: `pi0 train`, `pi0 infer` and the others in `COMMANDS`. Each is imported when it is called.

What a user can cause is printed as one message without a traceback, and the exit code is 1; a mistyped command or flag
gives 2, Ctrl-C 130, and SIGTERM 0 where the state was saved. PI0_TRACEBACK=1 shows tracebacks too, PI0_LOG=debug more
of the log.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import logging
import os
import re
import shlex
import sys
import traceback
from pathlib import Path

import tyro
from tqdm import tqdm

from pi0_jax.config import MeshConfig, TrainConfig
from pi0_jax.config_file import load_config, parse

COMMANDS = {
    "train": ("training", "train a policy: pi0 train configs/tabletop.py --batch-size 64"),
    "infer": ("evaluate", "run a policy on an observation or in a simulator: pi0 infer runs/tabletop --env tabletop"),
    "evaluate": ("evaluate", "run a policy in closed loop: pi0 evaluate runs/tabletop --episodes 200 --seed 1"),
    "report": ("evaluate", "evaluate a run in closed loop and write its report: pi0 report runs/tabletop"),
    "serve": ("serving", "serve a policy to robots, as openpi does: pi0 serve runs/tabletop"),
    "export": (
        "inference",
        "write a policy's programs and weights for machines without this package: pi0 export RUN DIR",
    ),
    "plan": (
        "plan",
        "say what training takes on devices that need not be there: pi0 plan configs/mine.py --topology h100:8",
    ),
    "reflow": ("training", "straighten a policy's flow, for fewer steps: pi0 reflow runs/tabletop runs/straight"),
    "compare": ("compare", "train and compare kinds of policies: pi0 compare configs/compare_tabletop.py"),
    "record": ("evaluate", "record demonstrations in the tabletop simulator: pi0 record data/tabletop"),
    "convert": (
        "convert",
        "turn openpi, LeRobot or big_vision weights into ours, and back: pi0 convert SRC DST --to lerobot",
    ),
    "inspect": ("convert", "say what a checkpoint of any format is: pi0 inspect PATH"),
    "diff": ("convert", "compare two checkpoints leaf by leaf: pi0 diff A B"),
    "data": ("data", "look at, check, convert and prepare demonstrations: pi0 data stats configs/mine.py"),
}
"""Command to the room whose `commands` module has it, and what it does."""
USAGE = "usage: pi0 COMMAND ...\n\n" + "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
USAGE += "\n\npi0 COMMAND --help says more."

PLAN_HELP = """\
Compiles the update of `pi0 train` with the same CONFIG and flags, and prints for each device: bytes, work, traffic, a
bound of the time; and where it does not fit, the nearest flags that do. Nothing is allocated, and no demonstrations are
read. NAME:SHAPE is a TPU slice (v4, v5e, v5p, v6e; needs libtpu, extra tpu) or GPUs (h100:8, h200, a100, l40s,
rtx4090), there or not; left out, it means the devices of this machine."""


def main(args: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        args: the command and its arguments; None: those of the process.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"pi0: there is no command {command!r}.{hint}\n\n{USAGE}", file=sys.stderr)
        return 2
    _set_up_logging()
    try:
        if command == "train":
            return _train(rest)
        if command == "plan":
            return _plan(rest)
        if command == "data":
            return _data(rest)
        commands = importlib.import_module(f"pi0_jax.{COMMANDS[command][0]}.commands")
        kind = getattr(commands, command.capitalize())
        arguments = tyro.cli(kind, args=rest, prog=f"pi0 {command}", description=_help(kind))
        getattr(commands, command)(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("PI0_TRACEBACK") or not _is_for_the_user(error):
            raise
        print(f"\npi0 {command}: {re.sub(r'^.Errno -?[0-9]+. ', '', str(error))}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def _help(kind: type) -> str:
    """What a command's dataclass says of itself, examples included, which tyro leaves out by itself."""
    return (inspect.getdoc(kind) or "").replace("\n\n    ", "\n    ")


def _train(args: list[str]) -> int:
    """`pi0 train CONFIG`: the file's config, with fields set anew by flags."""
    if not args or args[0].startswith("-"):
        text = "usage: pi0 train CONFIG [--sharding FILE] [--FIELD VALUE ...]\n\n"
        text += "  pi0 train configs/tabletop.py --optim.peak-lr 3e-4\n\n"
        text += "CONFIG is a Python file that defines `config`; pi0 train CONFIG --help lists its fields.\n"
        print(text + "FILE is one whose `config` is a `MeshConfig`, as those in configs/sharding/ have.")
        return 0 if args[:1] in (["-h"], ["--help"]) else 2
    config = _experiment(args, "train")
    from pi0_jax.training.interrupt import Interrupted
    from pi0_jax.training.loop import run

    try:
        run(config)
    except Interrupted as error:
        flags = [flag for flag in args if flag not in ("--resume", "--overwrite")]
        error.resume = f"pi0 train {shlex.join([*flags, '--resume'])}"
        raise
    return 0


def _experiment(args: list[str], command: str) -> TrainConfig:
    """What `CONFIG [--sharding FILE] [--FIELD VALUE ...]` means."""
    path, *overrides = args
    config = load_config(path, TrainConfig)
    if (preset := _take(overrides, "--sharding")) is not None:
        config = dataclasses.replace(config, mesh=load_config(preset, MeshConfig))
    example = f"Fields of {path}, which flags set anew: pi0 {command} {path} --optim.peak-lr 3e-4 --batch-size 64"
    return parse(config, overrides, prog=f"pi0 {command} {path}", description=example)


def _take(args: list[str], flag: str) -> str | None:
    """Takes a flag and its value out of `args`; None where it is not there."""
    if flag not in args:
        return None
    at = args.index(flag)
    value = args[at + 1] if at + 1 < len(args) else ""
    del args[at : at + 2]
    return value


def _plan(args: list[str]) -> int:
    """`pi0 plan CONFIG`: what the updates of a run take."""
    if not args or args[0].startswith("-"):
        text = "usage: pi0 plan CONFIG [--topology NAME:SHAPE] [--sharding FILE] [--FIELD VALUE ...]\n\n"
        text += "  pi0 plan configs/mine.py --topology v5e:4x4 --sharding configs/sharding/fsdp.py\n\n"
        text += PLAN_HELP
        print(text)
        return 0 if args[:1] in (["-h"], ["--help"]) else 2
    args = list(args)
    topology = _take(args, "--topology")
    from pi0_jax.plan.commands import plan

    plan(_experiment(args, "plan"), topology)
    return 0


def _data(args: list[str]) -> int:
    """`pi0 data SUBCOMMAND`: see `pi0_jax.data.commands`."""
    from pi0_jax.data.commands import SUBCOMMANDS

    if not args or args[0] in ("-h", "--help") or args[0] not in SUBCOMMANDS:
        lines = [f"  {name:8} {str(kind.__doc__).splitlines()[0]}" for name, (kind, _) in SUBCOMMANDS.items()]
        text = "usage: pi0 data SUBCOMMAND ...\n\n" + "\n".join(lines) + "\n\npi0 data SUBCOMMAND --help says more."
        if args and args[0] in ("-h", "--help"):
            print(text)
            return 0
        close = difflib.get_close_matches(args[0], SUBCOMMANDS, n=1) if args else []
        hint = (
            f"pi0 data: there is no {args[0]!r}.{f' Did you mean {close[0]!r}?' if close else ''}\n\n" if args else ""
        )
        print(hint + text, file=sys.stderr)
        return 2
    kind, function = SUBCOMMANDS[args[0]]
    arguments = tyro.cli(kind, args=args[1:], prog=f"pi0 data {args[0]}", description=_help(kind))
    function(arguments, load_config(arguments.config, TrainConfig) if hasattr(arguments, "config") else None)
    return 0


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message says it all: an error that our own code raised on purpose, or one of the system."""
    if isinstance(error, OSError) or hasattr(error, "exit_code"):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, (ValueError, FloatingPointError)) and Path(__file__).parent in Path(raised_in).parents


class _AboveTheBar(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord):
        tqdm.write(self.format(record), file=sys.stderr)


def _set_up_logging():
    logging.basicConfig(handlers=[_AboveTheBar()], format="%(message)s")
    logging.getLogger("pi0_jax").setLevel(os.environ.get("PI0_LOG", "info").upper())
    # Orbax and its event loop print the tracebacks of errors that reach the user as exceptions anyway.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
