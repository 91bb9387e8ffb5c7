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
    seed: int = 0
    """Seed of the noise, and of the simulator's layouts, which never overlap with those of demonstrations. Of rollouts
    that the run was trained on, take another one."""


Flags = TypeVar("Flags", bound=SimulatorFlags)


class Recording(NamedTuple):
    """How a dataset was recorded in a simulator."""

    dataset: str
    """Its folder."""
    simulator: str
    """Its name, or its Python file."""
    options: dict[str, Any]
    seed: int | None
    """Seed of the evaluation's layouts, where it has the rollouts of one."""


def with_simulator(args: Flags) -> Flags:
    """The flags with a simulator and all of its options; prints what comes from the run's demonstrations.

    Raises:
        UserError: neither the flags nor the run's demonstrations name a simulator, and none is of the policy's robot.
    """
    given, recordings = parse_options(args.env_options), find_recordings(args.run)
    if args.env is None:
        usable = [each for each in recordings if each.simulator in simulator_names() or Path(each.simulator).is_file()]
    else:
        usable = [each for each in recordings if Path(each.simulator).stem == Path(args.env).stem]
    if not usable:
        assets = load_assets(args.run)
        name = args.env or find_simulator(kept_robot(assets.policy.robot, assets.robot).name)
        return dataclasses.replace(args, env=name)
    first = usable[0]
    name = args.env or first.simulator
    words = {option: f"{option}={_word(value)}" for option, value in (first.options | given).items()}
    taken = [word for option, word in words.items() if option not in given]
    if taken or args.env is None:
        taken = " ".join([name, *taken])
        print(f"simulator {taken}, as {first.dataset} was recorded; --env and --env-options choose otherwise")
    for each in usable:
        if each.seed == args.seed and Path(each.simulator).stem == Path(name).stem:
            print(f"the run was trained on {each.dataset}, rollouts of seed {args.seed}; --seed gives other layouts")
    return dataclasses.replace(args, env=name, env_options=tuple(words.values()))


def find_recordings(run: Path) -> list[Recording]:
    """How those of a run's datasets were recorded that came from a simulator, and are where they were."""
    train = load_assets(run).train
    if train is None or not (train.data.datasets or train.data.path):
        return []
    found = []
    for dataset in dataset_configs(train.data):
        file = Path(dataset.path).expanduser() / STORY
        if dataset.robot not in (None, train.policy.robot) or not file.is_file():
            continue
        story = json.loads(file.read_text())
        if "simulator" in story:
            seed = story["seed"] if "policy" in story else None
            found.append(Recording(dataset.path, story["simulator"], dict(story["options"]), seed))
    return found


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
