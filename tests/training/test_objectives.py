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
from pi0_jax.config import CompactConfig, DataConfig, FlowConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.training.loop import run
from tests.conftest import tiny_config
from tests.data.conftest import write


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """Compact heads compile quickly."""
    folder = tmp_path_factory.mktemp("objectives")
    model = tiny_config(
        head="compact",
        compact=CompactConfig(width=16, depth=1, time_width=8),
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
    assert assets.train.reflow_from == assets.train.init_from == str(teacher)
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
    wider = dataclasses.replace(config.policy.model, compact=CompactConfig(width=24, depth=2, time_width=8))
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
    ("fields", "flow", "prediction", "message"),
    [
        ({"init_parts": ("backbone",)}, {}, "velocity", "parts of nothing: name a checkpoint, --init-from"),
        ({}, {"drop_prompt": 1.5}, "velocity", "flow.drop_prompt is 1.5; it is a probability"),
        ({}, {"drop_prompt": 0.6, "drop_both": 0.6}, "velocity", "their sum is above 1"),
        ({}, {"shortcut_share": 0.0}, "average_velocity", "flow.shortcut_share is 0.0"),
        ({}, {"coupling": "optimal"}, "v", "straighten a flow; this network predicts v"),
        (
            {"reflow_from": "teacher"},
            {},
            "average_velocity",
            "straighten a flow; this network predicts average_velocity",
        ),
        ({"reflow_from": "teacher"}, {"coupling": "optimal"}, "velocity", "reflow has its own pairs"),
        ({"reflow_from": "teacher"}, {"mean_steps": 3}, "velocity", "reflow has its own pairs"),
        ({}, {"mean_draw": True}, "epsilon", "the mean draw teaches a velocity"),
    ],
)
def test_objectives_whose_settings_do_not_go_together_are_refused(config, tmp_path, fields, flow, prediction, message):
    model = dataclasses.replace(config.policy.model, prediction=prediction)
    policy = dataclasses.replace(
        config.policy, model=model, solver="ddim" if prediction in ("epsilon", "v") else "euler"
    )
    changed = dataclasses.replace(
        config, policy=policy, flow=FlowConfig(**flow), run_dir=str(tmp_path / "run"), **fields
    )
    with pytest.raises(ValueError, match=message):
        run(changed)


def test_parts_that_begin_no_parameter_are_refused_with_those_that_exist(config, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"init_parts \['backbones'\] begin no parameter; there are .*'backbone'"):
        run(
            dataclasses.replace(
                config, init_from=str(teacher), init_parts=("backbones",), run_dir=str(tmp_path / "run")
            )
        )


@pytest.mark.parametrize("prediction", ["v", "bin_sequence"])
def test_a_run_of_any_prediction_trains_validates_and_leaves_a_checkpoint(config, tmp_path, prediction):
    head = "expert" if prediction == "bin_sequence" else "compact"
    model = dataclasses.replace(config.policy.model, prediction=prediction, head=head, action_horizon=2)
    policy = PolicyConfig(
        model=dataclasses.replace(model, bins=dataclasses.replace(model.bins, count=8, dims=3)),
        solver="ddim" if prediction == "v" else "euler",
        normalization="quantile",
    )
    flow = FlowConfig(drop_prompt=0.1, samples_per_observation=2)
    done = run(dataclasses.replace(config, policy=policy, flow=flow, run_dir=str(tmp_path / "run"), num_steps=2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.restore_params(done)))
    validated = rows(tmp_path / "run")[-1]
    assert np.isfinite(validated["validation_loss"])
    assert "straightness" not in validated  # it is no flow
