"""Flags that name a simulator; what is not given is as the run's demonstrations were recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro

from pi0_jax.checkpoint import load_assets
from pi0_jax.data.mixture import dataset_configs
from pi0_jax.data.robot_json import kept_robot
from pi0_jax.errors import UserError
from pi0_jax.evaluate.record import STORY
from pi0_jax.evaluate.simulators import find_simulator, simulator_names

Run = Annotated[Path, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class SimulatorFlags:
    """A run, and the simulator to evaluate it in."""

    run: Run
    """Run folder, or the folder of one checkpoint in it."""
    env: str | None = None
    """Simulator to run in: its name, or a Python file (pi0_jax.evaluate.simulators). By default the one in which the
    run's demonstrations were recorded, if one was, or else the first of the policy's robot."""
    env_options: tuple[str, ...] = ()
    """Options of the simulator, as NAME=VALUE, such as image_size=96, or counterfactual=true: the instruction asks for
    something else than what is scored, to see whether the policy ignores it. One that is not given is as the run's
    demonstrations were recorded, if they were in this simulator."""
    env_python: Path | None = None
    """Interpreter that has the simulator's packages, if this one has not; neither JAX nor pi0_jax has to be in it. By
    default this one, or that of `pi0 env install`."""


Flags = TypeVar("Flags", bound=SimulatorFlags)


class Recording(NamedTuple):
    """How a dataset was recorded."""

    dataset: str
    """Its folder."""
    simulator: str
    """Its name, or its Python file."""
    options: dict[str, Any]


def with_simulator(args: Flags) -> Flags:
    """The flags with a simulator and all of its options; prints what comes from the run's demonstrations.

    Raises:
        UserError: neither the flags nor the run's demonstrations name a simulator, and none is of the policy's robot.
    """
    given, recording = parse_options(args.env_options), find_recording(args.run, args.env)
    if recording is None:
        assets = load_assets(args.run)
        name = args.env or find_simulator(kept_robot(assets.policy.robot, assets.robot).name)
        return dataclasses.replace(args, env=name)
    words = {name: f"{name}={_word(value)}" for name, value in (recording.options | given).items()}
    taken = [word for name, word in words.items() if name not in given]
    if taken or args.env is None:
        taken = " ".join([recording.simulator, *taken])
        print(f"simulator {taken}, as {recording.dataset} was recorded; --env and --env-options choose otherwise")
    return dataclasses.replace(args, env=recording.simulator, env_options=tuple(words.values()))


def find_recording(run: Path, simulator: str | None = None) -> Recording | None:
    """How the first of the run's datasets was recorded that came from a simulator, or from the one given; None where no
    dataset says so, or is not there."""
    train = load_assets(run).train
    if train is None or not (train.data.datasets or train.data.path):
        return None
    for dataset in dataset_configs(train.data):
        story = Path(dataset.path).expanduser() / STORY
        if dataset.robot not in (None, train.policy.robot) or not story.is_file():
            continue
        found = json.loads(story.read_text())
        name = str(found.get("simulator"))
        if simulator is not None and Path(name).stem == Path(simulator).stem:
            return Recording(dataset.path, simulator, dict(found.get("options", {})))
        if simulator is None and (name in simulator_names() or Path(name).is_file()):
            return Recording(dataset.path, name, dict(found.get("options", {})))
    return None


def parse_options(texts: tuple[str, ...]) -> dict[str, Any]:
    """Options of a simulator from NAME=VALUE; a value is JSON, or else text.

    Raises:
        UserError: a text has no "=".
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--env-options got {text!r}; expected NAME=VALUE, such as counterfactual=true.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _word(value: Any) -> str:
    """A value as `parse_options` reads it back: JSON, and text without quotes where that is the same."""
    return value if isinstance(value, str) and parse_options((f"x={value}",))["x"] == value else json.dumps(value)
