"""Flags set fields of a config anew, choose among kinds, and name those of today where they are of version 1."""

import dataclasses
import functools

import pytest

from pi0_jax.config import Beta, Gaussian, Guidance, PolicyConfig, Reflow, Tokens, TrainConfig, Uniform
from pi0_jax.config_file import RENAMED, load_config, parse
from pi0_jax.errors import UserError
from pi0_jax.sampler import Euler, Greedy
from pi0_jax.sampler.runge_kutta import Heun

CONFIG = TrainConfig(policy=PolicyConfig(robot="aloha", objective=Gaussian(draws=3), sampler=Euler(7)))


def parsed(*args: str) -> TrainConfig:
    return parse(CONFIG, list(args), prog="pi0 train x.py", description="")


def test_a_flag_with_a_class_name_chooses_the_class_and_keeps_common_fields():
    assert parsed("--policy.sampler", "heun").policy.sampler == Heun(7)
    assert parsed("--policy.sampler=Heun", "--policy.sampler.num-steps", "4").policy.sampler == Heun(4)
    reflow = parsed("--policy.objective", "reflow", "--policy.objective.teacher", "runs/x").policy.objective
    assert reflow == Reflow(teacher="runs/x", draws=3, time=Beta())
    tokens = parsed(
        "--policy.objective", "Tokens", "--policy.sampler", "greedy", "--policy.objective.bins", "16"
    ).policy
    assert (tokens.objective, tokens.sampler) == (Tokens(bins=16), Greedy())


def test_flags_reach_fields_of_nested_kinds():
    config = parsed("--policy.objective.time", "uniform", "--policy.objective.draws", "2")
    assert config.policy.objective == Gaussian(draws=2, time=Uniform())
    assert parsed("--policy.objective.time.alpha", "2.5").policy.objective.time == Beta(2.5)


def test_an_optional_kind_is_switched_on_and_off():
    guided = parsed("--policy.guidance", "guidance", "--policy.guidance.scale", "2")
    assert guided.policy.guidance == Guidance(2.0)
    assert parse(guided, ["--policy.guidance", "None"], prog="", description="").policy.guidance is None


def test_an_unknown_kind_is_refused_with_the_choices_and_the_nearest():
    with pytest.raises(UserError, match=r"--policy.sampler is 'huen'; choose .*RK4\. Did you mean 'heun'\?"):
        parsed("--policy.sampler", "huen")


def test_a_required_field_of_the_chosen_kind_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parsed("--policy.objective", "reflow")
    assert "--policy.objective.teacher" in capsys.readouterr().err


@pytest.mark.parametrize("old", RENAMED)
def test_flags_of_version_1_name_those_of_today(old):
    with pytest.raises(UserError, match=f"--{RENAMED[old]} now"):
        parsed(f"--{old}", "1")


@pytest.mark.parametrize("new", sorted(set(RENAMED.values())))
def test_the_flags_they_name_exist(new):
    assert any(f"--{new}{end}" in text for text in _helps() for end in (" ", ",", "\n")), new


@functools.cache
def _helps() -> list[str]:
    """What `--help` says with each kind of objective and of coupling that has flags of its own."""
    found = [_help(CONFIG, ["--policy.objective", "shortcut"])]
    for objective in (Gaussian(), Reflow(teacher="x"), Tokens()):
        policy = dataclasses.replace(CONFIG.policy, objective=objective, guidance=Guidance())
        for coupling in ("OptimalTransport", "Independent") if isinstance(objective, Gaussian) else (None,):
            args = ["--policy.objective.coupling", coupling] if coupling else []
            found.append(_help(dataclasses.replace(CONFIG, policy=policy), args))
    return found


def _help(config: TrainConfig, args: list[str]) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse(config, [*args, "--help"], prog="", description="")
    return out.getvalue()


def test_a_config_may_derive_from_one_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    folder.mkdir()
    text = "from pi0_jax.config import PolicyConfig, TrainConfig\n"
    (folder / "base.py").write_text(text + "config = TrainConfig(policy=PolicyConfig(robot='aloha'))\n")
    derived = folder / "derived.py"
    derived.write_text(
        "import dataclasses\nfrom experiments.base import config\nconfig = dataclasses.replace(config, seed=3)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config(derived, TrainConfig).seed == 3
    assert load_config("experiments/derived.py", TrainConfig).seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TrainConfig(parts=2)", "`parts` is `grad_accum_steps` now"),
        ("FlowConfig()", "FlowConfig is the policy's objective now"),
    ],
)
def test_a_file_of_version_1_says_what_the_names_are_today(tmp_path, text, message):
    path = tmp_path / "old.py"
    path.write_text(f"from pi0_jax.config import {text.partition('(')[0]}\nconfig = {text}\n")
    with pytest.raises(UserError, match=message):
        load_config(path, TrainConfig)
