"""Runs with an objective other than plain flow matching: reflow end to end, parts of other weights, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax import checkpoint, cli
from pi0_jax.checkpoint import Assets, CheckpointWriter
from pi0_jax.config import (
    Compact,
    ConditionDropout,
    Cosine,
    DataConfig,
    Expert,
    Gaussian,
    OptimConfig,
    PolicyConfig,
    RealTimeConfig,
    Reflow,
    Shortcut,
    Tokens,
    TrainConfig,
)
from pi0_jax.errors import UserError
from pi0_jax.sampler import Euler, Greedy
from pi0_jax.sampler.runge_kutta import Heun
from pi0_jax.training import commands
from pi0_jax.training.commands import reflow
from pi0_jax.training.loop import run
from pi0_jax.training.resolve import resolve
from tests.conftest import tiny_config
from tests.data.conftest import write


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """Compact heads compile quickly."""
    folder = tmp_path_factory.mktemp("objectives")
    model = tiny_config(
        head=Compact(width=16, depth=1, time_width=8),
        cameras=("top",),
        action_dim=8,
        vocab_size=512,
        prompt_length=16,
    )
    return TrainConfig(
        policy=PolicyConfig(robot="tabletop", model=model),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=0, ema_decay=0.9),
        data=DataConfig(str(write(folder / "data")), str(write(folder / "held_out", (5,)))),
        run_dir=str(folder / "teacher"),
        batch_size=8,
        num_steps=3,
        validate_every=2,
    )


@pytest.fixture(scope="module")
def teacher(config) -> Path:
    return run(config)


def rows(run_dir: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def weights(path) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(checkpoint.restore_params(path), sep="/").items()}


def test_reflow_trains_a_student_on_the_teachers_pairs_and_says_how_straight_it_is(config, teacher, tmp_path):
    student = tmp_path / "student"
    arguments = ["reflow", config.run_dir, str(student), "--num-steps", "5", "--teacher-steps", "2"]
    assert cli.main(arguments) == 0
    assets = checkpoint.load_assets(student)
    assert assets.train is not None
    assert assets.policy.objective == Reflow(teacher=str(teacher), teacher_steps=2)
    assert assets.train.init_from == str(teacher)
    assert assets.train.optim.peak_lr == config.optim.peak_lr / 4
    assert assets.tokenizer == checkpoint.load_assets(teacher).tokenizer
    measured = [row for row in rows(student) if "straightness" in row]
    assert [row["step"] for row in measured] == [2, 4, 5]
    for row in measured:
        assert row["straightness"] > 0
        assert np.isfinite(row["validation_loss"])
    # The student began as the teacher, and learnt.
    before, after = weights(teacher), weights(student)
    changes = {name: np.abs(after[name] - before[name]).max() for name in before}
    assert max(changes.values()) < 1e-2
    assert max(changes.values()) > 0
    assert cli.main([*arguments, "--resume"]) == 0


def test_reflow_of_weights_that_do_not_say_how_they_were_trained_is_refused(config, teacher, tmp_path, capsys):
    with CheckpointWriter(tmp_path / "bare", keep=1) as writer:
        writer.save(1, checkpoint.restore_params(teacher), Assets(config.policy, None, None))
        writer.wait()
    assert cli.main(["reflow", str(tmp_path / "bare"), str(tmp_path / "student")]) == 1
    assert "does not say how it was trained" in capsys.readouterr().err


def test_a_run_takes_named_parts_of_other_weights_and_random_ones_for_the_rest(config, teacher, tmp_path):
    wider = dataclasses.replace(config.policy.model, head=Compact(width=24, depth=2, time_width=8))
    other = dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, model=wider),
        init_from=str(teacher),
        init_parts=("backbone", "embedding"),
        run_dir=str(tmp_path / "other"),
        seed=1,
        num_steps=1,
        data=dataclasses.replace(config.data, validation_path=None),
    )
    before, after = weights(teacher), weights(run(other))
    for name in after:
        taken = name.startswith(("backbone", "embedding"))
        same = name in before and before[name].shape == after[name].shape
        same = same and np.abs(after[name] - before[name]).max() < 1e-3
        # Kernels are random; biases and scales of norms start alike in any run.
        assert same if taken else not (same and name.endswith("kernel")), name


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"objective": Gaussian(dropout=ConditionDropout(prompt=1.5))}, "dropout.prompt is 1.5; it is a probability"),
        ({"objective": Gaussian(dropout=ConditionDropout(prompt=0.6, both=0.6))}, "their sum is above 1"),
        ({"objective": Gaussian(predicts="noise", regression_warmup_steps=3)}, "nothing to regress on"),
        ({"objective": Shortcut(bootstrap_fraction=0.0)}, "bootstrap_fraction is 0.0"),
        ({"objective": Shortcut(bootstrap_fraction=0.1)}, r"draws\.bootstrap.* of 1 examples .* a multiple of 8"),
        ({"objective": Shortcut(bootstrap_fraction=0.5), "sampler": Heun()}, "sampled in equal steps of Euler"),
        ({"objective": Tokens(), "sampler": Greedy()}, "takes quantile normalisation"),
        ({"objective": Tokens(), "normalization": "quantile"}, "Tokens is sampled by Greedy"),
        ({"sampler": Greedy()}, "is sampled by a solver"),
        ({"real_time": RealTimeConfig("trained")}, "was not trained to go on from clean actions"),
    ],
)
def test_objectives_whose_settings_do_not_go_together_are_refused(config, policy, message):
    head = Expert() if isinstance(policy.get("objective"), Tokens) else config.policy.model.head
    policy = dataclasses.replace(config.policy, model=dataclasses.replace(config.policy.model, head=head), **policy)
    with pytest.raises(UserError, match=message):
        resolve(dataclasses.replace(config, policy=policy))


def test_names_of_parameters_without_a_checkpoint_are_refused(config):
    with pytest.raises(UserError, match="name parameters of no checkpoint: give --init-from"):
        resolve(dataclasses.replace(config, init_parts=("backbone",)))


def test_reflow_takes_a_teacher_that_predicts_velocities(config, teacher, tmp_path):
    with CheckpointWriter(tmp_path / "noise", keep=1) as writer:
        policy = dataclasses.replace(config.policy, objective=Gaussian(predicts="noise", path=Cosine()))
        assets = checkpoint.load_assets(teacher)
        train = dataclasses.replace(config, policy=policy)
        writer.save(1, checkpoint.restore_params(teacher), assets._replace(policy=policy, train=train))
        writer.wait()
    with pytest.raises(UserError, match="straightens a flow that predicts velocities"):
        reflow(commands.Reflow(tmp_path / "noise", tmp_path / "student"))


def test_parts_that_begin_no_parameter_are_refused_with_those_that_exist(config, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"init_parts \['backbones'\] begin no parameter; there are .*'backbone'"):
        run(
            dataclasses.replace(
                config, init_from=str(teacher), init_parts=("backbones",), run_dir=str(tmp_path / "run")
            )
        )


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (Gaussian(predicts="v", path=Cosine(), draws=2, dropout=ConditionDropout(prompt=0.1)), Euler()),
        (Tokens(bins=8, dims=3, order="autoregressive", dropout=ConditionDropout(prompt=0.1)), Greedy()),
    ],
    ids=["v", "tokens"],
)
def test_a_run_of_any_objective_trains_validates_and_leaves_a_checkpoint(config, tmp_path, objective, sampler):
    head = Expert() if isinstance(objective, Tokens) else config.policy.model.head
    model = dataclasses.replace(config.policy.model, head=head, action_horizon=2)
    policy = PolicyConfig(robot="tabletop", model=model, objective=objective, sampler=sampler, normalization="quantile")
    done = run(dataclasses.replace(config, policy=policy, run_dir=str(tmp_path / "run"), num_steps=2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.restore_params(done)))
    validated = rows(tmp_path / "run")[-1]
    assert np.isfinite(validated["validation_loss"])
    assert ("straightness" in validated) == isinstance(objective, Gaussian)  # tokens are no flow
    assert np.isfinite(validated.get("straightness", 0.0))
