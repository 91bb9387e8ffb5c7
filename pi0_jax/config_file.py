"""Experiment files, Python that ends in `config = ...`, and the flags that set their fields anew."""

from __future__ import annotations

import dataclasses
import inspect
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro

from pi0_jax import config_json
from pi0_jax.errors import UserError, did_you_mean

Config = TypeVar("Config")

RENAMED = {
    "flow.time": "policy.objective.time",
    "flow.beta-alpha": "policy.objective.time.alpha",
    "flow.samples-per-observation": "policy.objective.draws",
    "flow.mean-draw": "policy.objective.regression-draw",
    "flow.mean-steps": "policy.objective.regression-warmup-steps",
    "flow.coupling": "policy.objective.coupling",
    "flow.condition-weight": "policy.objective.coupling.condition-weight",
    "flow.drop-prompt": "policy.objective.dropout.prompt",
    "flow.drop-images": "policy.objective.dropout.images",
    "flow.drop-both": "policy.objective.dropout.both",
    "flow.shortcut-share": "policy.objective.bootstrap-fraction",
    "flow.reflow-steps": "policy.objective.teacher-steps",
    "flow.mask-padded-steps": "policy.objective.mask-padded-steps",
    "flow.mask-padded-dims": "policy.objective.mask-padded-dims",
    "policy.model.prediction": "policy.objective",
    "policy.model.max-delay": "policy.objective.max-delay",
    "policy.model.compact": "policy.model.head",
    "policy.model.bins.count": "policy.objective.bins",
    "policy.model.bins.dims": "policy.objective.dims",
    "policy.solver": "policy.sampler",
    "policy.num-steps": "policy.sampler.num-steps",
    "policy.grid-power": "policy.sampler.grid-power",
    "policy.guidance-scale": "policy.guidance.scale",
    "policy.guidance-without": "policy.guidance.without",
    "reflow-from": "policy.objective.teacher",
    "parts": "grad-accum-steps",
    "skip-in-row": "max-consecutive-skips",
    "skip-in-total": "max-total-skips",
}
"""Flags of version 1 to those of today."""


def load_config(path: str | Path, kind: type[Config]) -> Config:
    """Executes a Python file and returns its `config`. It may import from its folder (`from configs.x import config`).

    Args:
        path: the file.
        kind: what its `config` has to be.

    Raises:
        FileNotFoundError: no such file; the message lists those beside it.
        UserError: the file fails, defines no `config`, one of another type, or one with a value that is not of its
            field's type.
    """
    path = Path(path)
    if path.is_dir():
        dataset = any((path / name).is_file() for name in ("meta/info.json", "features.json"))
        hint = (
            f" It is a dataset: name it in a config's `data.path`; `pi0 data robot {path}` begins." if dataset else ""
        )
        raise FileNotFoundError(
            f"{path} is a folder; expected a config, a Python file such as configs/tabletop.py.{hint}"
        )
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        names = sorted(str(p) for p in folder.glob("*.py"))
        hint = did_you_mean(folder / f"{path.stem}.py", names).replace("'", "")
        raise FileNotFoundError(f"there is no config {path}. {folder} has: {', '.join(names) or 'none'}.{hint}")
    above = str(path.absolute().parents[1])
    sys.path.insert(0, above)
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f"line {lines[-1]} of {path}" if lines else str(path)
        raise UserError(f"{where} fails with {type(error).__name__}: {error}{_renamed_field(error)}") from error
    finally:
        sys.path.remove(above)
    config = namespace.get("config")
    if not isinstance(config, kind):
        found = "defines no `config`" if config is None else f"has a `config` of type {type(config).__name__}"
        raise UserError(f"{path} {found}; it has to end in `config = {kind.__name__}(...)`. See the files in configs/.")
    config_json.check(config, kind, f"{path}: config")
    return config


def parse(config: Config, args: list[str], *, prog: str, description: str) -> Config:
    """The configuration with fields set anew by flags, `--optim.peak-lr 3e-4`.

    Where a field may be one of several classes, `--policy.sampler Heun` chooses, `--policy.sampler.num-steps 5` sets
    a field of the chosen one; fields that both classes have keep their values.

    Args:
        config: the defaults.
        args: the flags.
        prog, description: for `--help`.

    Raises:
        UserError: a flag of version 1, with the one of today; or a class that is not among the choices.
        SystemExit: `--help`, or flags that do not exist, which are named with the nearest that do.
    """
    for argument in args:
        flag = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        if argument.startswith("--") and flag in RENAMED:
            raise UserError(f"--{flag} is --{RENAMED[flag]} now. {prog} --help lists the flags.")
    config, args = _choose(config, list(args))
    choices = [f"--{name} {{{', '.join(members)}}} (now {now})" for name, members, now in _choices(config)]
    text = f"{description}\n\nChoices of kinds, each with fields of its own:\n" + "\n".join(choices)
    return tyro.cli(
        type(config), default=config, args=args, prog=prog, description=text, config=(tyro.conf.AvoidSubcommands,)
    )


def _choose(config: Any, args: list[str]) -> tuple[Any, list[str]]:
    """Replaces values of unions by the classes that flags name, outer ones first."""
    for name, members, _ in _choices(config):
        taken = [i for i, a in enumerate(args) if a.partition("=")[0].replace("_", "-") == f"--{name}"]
        if not taken:
            continue
        at = taken[-1]
        word = args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")
        names = {member.lower(): member for member in members}
        if word.lower() not in names:
            raise UserError(f"--{name} is {word!r}; choose {', '.join(members)}.{did_you_mean(word.lower(), names)}")
        rest = args[:at] + args[at + (1 if "=" in args[at] else 2) :]
        path = name.replace("-", "_").split(".")
        return _choose(_replaced(config, path, members[names[word.lower()]]), rest)
    return config, args


def _choices(config: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, type | None], str]]:
    """Fields that may hold one of several classes: flag, classes by name, and the present one's name."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        union = typing.get_origin(hints[field.name]) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hints[field.name]) if union else ()
        classes = [k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)]
        members: dict[str, type | None] = {k.__name__: k for k in classes}
        if members and type(None) in kinds:
            members["None"] = None
        if members:
            yield flag, members, "None" if value is None else type(value).__name__
        if dataclasses.is_dataclass(value):
            yield from _choices(value, flag + ".")


def _replaced(config: Any, path: list[str], kind: type | None) -> Any:
    """The configuration with a value of another class in one place."""
    head, *rest = path
    value = getattr(config, head)
    if rest:
        return dataclasses.replace(config, **{head: _replaced(value, rest, kind)})
    if kind is None or type(value) is kind:
        return dataclasses.replace(config, **{head: None if kind is None else value})
    kept = {f.name for f in dataclasses.fields(value)} if value is not None else set()
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind) if f.name in kept}
    required = [n for n, p in inspect.signature(kind).parameters.items() if p.default is inspect.Parameter.empty]
    fields = {name: tyro.MISSING for name in required} | fields
    return dataclasses.replace(config, **{head: kind(**fields)})


def _renamed_field(error: Exception) -> str:
    """What a name of version 1 is called today, where a file fails over one."""
    for old, new in RENAMED.items():
        name = old.rpartition(".")[2].replace("-", "_")
        if isinstance(error, TypeError) and f"unexpected keyword argument '{name}'" in str(error):
            return f". `{name}` is `{new.replace('-', '_')}` now"
    if isinstance(error, ImportError) and "FlowConfig" in str(error):
        return ". FlowConfig is the policy's objective now: PolicyConfig(objective=Gaussian(...))"
    return ""
