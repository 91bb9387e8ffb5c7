"""Configurations survive JSON, and wrong values are named with the way out."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

import pytest

from pi0_jax import config_json
from pi0_jax.config import PI05, Compact, Guidance, ModelConfig, PolicyConfig, Tokens, TrainConfig
from pi0_jax.config import Reflow as ReflowObjective
from pi0_jax.errors import UserError
from pi0_jax.sampler import Greedy
from pi0_jax.sampler.ddim import DDIM


@dataclasses.dataclass(frozen=True)
class Straight:
    pass


@dataclasses.dataclass(frozen=True)
class Cosine:
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Gaussian:
    path: Straight | Cosine = Straight()
    draws: int = 1


@dataclasses.dataclass(frozen=True)
class Reflow(Gaussian):
    teacher: str = "t"
    terms: tuple[Straight | Cosine, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
    objective: Gaussian | Reflow = Gaussian()
    guidance: Straight | Cosine | None = None
    teacher: Gaussian | None = None
    order: Annotated[Literal["parallel", "autoregressive"] | None, "a note"] = None
    sizes: tuple[int, float] = (1, 2.0)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    peak: float | None = None
    resume: bool = False


EXPERIMENTS = [
    Experiment(),
    Experiment(Reflow(Cosine(2.0), terms=(Cosine(), Straight())), Cosine(), Gaussian(), "parallel", names={"a": "b"}),
]


@pytest.mark.parametrize("config", EXPERIMENTS)
def test_tagged_unions_survive_json(config):
    content = json.loads(json.dumps(config_json.dump(config)))
    assert content["objective"]["type"] == type(config.objective).__name__
    assert config_json.load(content, Experiment, "config") == config


@pytest.mark.parametrize(
    "policy",
    [
        PolicyConfig(robot="libero", model=PI05),
        PolicyConfig(robot="libero", objective=Tokens(), sampler=Greedy(), model=ModelConfig(head=Compact(width=3))),
        PolicyConfig(
            robot="libero", objective=ReflowObjective(teacher="runs/t"), sampler=DDIM(), guidance=Guidance(2.0)
        ),
    ],
)
def test_every_configuration_of_the_package_survives_json(policy):
    config = TrainConfig(policy=policy, num_steps=7)
    content = json.loads(json.dumps(config_json.dump(config)))
    assert config_json.load(content, TrainConfig, "config") == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("order", "paralel", r"config\.order is 'paralel'; expected one of .*\. Did you mean 'parallel'\?"),
        ("objective", "gaussian", r"config\.objective is 'gaussian'; expected Gaussian\(\.\.\.\) or Reflow\(\.\.\.\)"),
        ("objective", None, r"config\.objective is None; expected Gaussian"),
        (
            "objective",
            dataclasses.replace(Gaussian(), **{"draws": "4"}),
            r"config\.objective\.draws is '4'; expected int\.",
        ),
        (
            "teacher",
            dataclasses.replace(Reflow(), **{"terms": (Cosine(), "straight")}),
            r"teacher\.terms\[1\] is 'straight'; expected Straight",
        ),
        ("sizes", (1, 2.0, 3.0), r"config\.sizes is .*; expected 2 values"),
        ("sizes", (1.5, 2), r"config\.sizes\[0\] is 1\.5; expected int"),
        ("peak", "fast", r"config\.peak is 'fast'; expected float"),
        ("resume", 1, r"config\.resume is 1; expected bool"),
        ("sizes", (True, 2.0), r"config\.sizes\[0\] is True; expected int"),
    ],
)
def test_a_wrong_value_is_named_with_its_field_and_what_was_expected(field, value, message):
    with pytest.raises(UserError, match=message):
        config_json.check(dataclasses.replace(Experiment(), **{field: value}), Experiment, "config")


@pytest.mark.parametrize("config", [*EXPERIMENTS, Experiment(peak=1, sizes=(1, 2))])
def test_right_values_pass_whole_numbers_for_floats_too(config):
    config_json.check(config, Experiment, "config")


def test_json_that_does_not_fit_names_every_field():
    content: dict[str, Any] = config_json.dump(Experiment()) | {"sizs": [1, 2]}
    content["objective"]["draws"] = "many"
    with pytest.raises(UserError, match=r"expected int @ config\.objective\.draws; .*sizs.* @ config"):
        config_json.load(content, Experiment, "config")
