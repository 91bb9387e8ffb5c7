"""What is frozen has no gradient, optimizer state or average, and stays what the checkpoint held, rounded once."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from pi0_jax import checkpoint
from pi0_jax.config import (
    PI0,
    DataConfig,
    Gaussian,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PolicyConfig,
    TrainConfig,
    TuneConfig,
)
from pi0_jax.convert.run import convert
from pi0_jax.inference.policy import Policy
from pi0_jax.objective import make_objective
from pi0_jax.training import low_precision
from pi0_jax.training.init_weights import first_weights
from pi0_jax.training.loop import run
from pi0_jax.training.partition import combine, flat, frozen_names, partition, table, with_adapters
from pi0_jax.training.program import Program, build
from pi0_jax.training.resolve import Run, resolve
from tests.data.conftest import write
from tests.policies import TINY

MODEL = TINY.model
LORA = TuneConfig("lora", lora_ranks=(2, 4))


@pytest.fixture(scope="module")
def config(tmp_path_factory, checkpoint_folder) -> TrainConfig:
    return TrainConfig(
        policy=TINY,
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=4, ema_decay=0.5),
        data=DataConfig(str(write(tmp_path_factory.mktemp("tune") / "data"))),
        init_from=str(checkpoint_folder),
        batch_size=8,
        num_steps=2,
    )


def weights_of(model: ModelConfig):
    return meta.unbox(jax.eval_shape(make_objective(Gaussian(), model).network.init, jax.random.key(0)))


def frozen_of(model: ModelConfig, tune: TuneConfig) -> frozenset[str]:
    config = with_adapters(TrainConfig(policy=PolicyConfig(robot="tabletop", model=model), tune=tune))
    return frozen_names(tune, config.policy.model, flat(weights_of(config.policy.model)))


def tops(names) -> set[str]:
    return {"/".join(name.split("/")[:3]) if name.startswith("backbone/l") else name.split("/")[0] for name in names}


EXPERT = {"backbone/layers/language", "backbone/language_norm/scale", "embedding", "image_encoder", "image_projector"}


@pytest.mark.parametrize(
    ("tune", "frozen"),
    [
        (TuneConfig(), set()),
        (TuneConfig("expert"), EXPERT),
        (TuneConfig("vision_frozen"), {"image_encoder"}),
        (LORA, {"backbone/layers/language", "backbone/layers/action", "backbone", "embedding"}),
        (TuneConfig("expert", trained=("image_projector/*",)), EXPERT - {"image_projector"}),
        (TuneConfig(frozen=("action_out/*", "*state_in*")), {"action_out", "state_in"}),
    ],
)
def test_recipes_and_patterns_freeze_what_they_say(tune, frozen):
    names = frozen_of(MODEL, tune)
    found = tops(names)
    if "backbone" in frozen:
        found = {
            "backbone" if n in ("backbone/language_norm/scale", "backbone/action_norm/scale") else n for n in found
        }
    assert found | {"backbone"} == frozen | {"backbone"}
    assert not any("_lora_" in name for name in names)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (TuneConfig(frozen=("vision/*",)), r"tune\.frozen 'vision/\*' matches no parameter.*image_encoder"),
        (TuneConfig(trained=("encoder",)), r"tune\.trained 'encoder' matches no parameter"),
        (TuneConfig(frozen=("*",)), r"freezes all \d+ parameters.*--tune\.trained"),
        (TuneConfig("lora", lora_ranks=(0, 0)), r"needs adapters, and tune\.lora_ranks are \(0, 0\)"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(tune, message):
    with pytest.raises(ValueError, match=message):
        frozen_of(MODEL, tune)


def test_adapters_on_one_expert_leave_the_other_trained_and_are_trained_under_any_recipe():
    action = dataclasses.replace(MODEL, action=dataclasses.replace(MODEL.action, lora_attn_rank=2))
    assert (
        with_adapters(TrainConfig(policy=PolicyConfig(robot="tabletop", model=action), tune=LORA)).policy.model
        == action
    )
    names = flat(weights_of(action))
    frozen = frozen_of(action, TuneConfig("lora"))
    assert "backbone/layers/action/attn/q" in frozen
    assert not any("language" in name or name == "embedding" for name in frozen)
    adapters = {name for name in names if "_lora_" in name}
    assert len(adapters) == 6
    for recipe in ("lora", "expert", "vision_frozen"):
        assert not adapters & frozen_of(action, TuneConfig(recipe))


def test_openpis_adapters_at_full_size_freeze_both_experts_and_train_the_rest():
    config = with_adapters(TrainConfig(policy=PolicyConfig(robot="tabletop", model=PI0), tune=TuneConfig("lora")))
    names = flat(weights_of(config.policy.model))
    trained, frozen = partition(combine(names, None), frozen_of(PI0, TuneConfig("lora")))
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in (("t", trained), ("f", frozen))}
    plain = sum(x.size for x in jax.tree.leaves(weights_of(PI0)))
    adapters = sum(x.size for name, x in names.items() if "_lora_" in name)
    assert count["f"] + count["t"] == plain + adapters
    assert {name.split("/")[0] for name in frozen} == {"backbone", "embedding"}
    assert {name.split("/")[0] for name in trained} >= {"image_encoder", "image_projector", "action_in", "state_in"}
    lines = table(trained, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)).splitlines()
    rows = {line.split("  ")[1]: line.split() for line in lines}
    assert rows["embedding"] == ["embedding", f"{257_152 * 2048:,}", "-", "bfloat16"]
    assert rows["image_encoder"][1:] == [rows["image_encoder"][1]] * 2 + ["float32"]
    assert rows["all"][1:3] == [f"{plain + adapters:,}", f"{count['t']:,}"]


def built(config: TrainConfig) -> tuple[Run, Program]:
    resolved = resolve(config, jax.devices()[:1])
    return resolved, build(resolved, lambda key, batch: batch)


def same_bits(a, b) -> bool:
    return a.dtype == b.dtype and np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_frozen_weights_are_the_checkpoints_rounded_once_under_fsdp_and_after_resume(config, tmp_path, monkeypatch):
    monkeypatch.setattr(low_precision, "SMALLEST", 512)
    before = {name: np.asarray(x) for name, x in flat(checkpoint.restore_params(config.init_from)).items()}
    optim = dataclasses.replace(config.optim, name="adamw_8bit")
    mesh = MeshConfig(data=1, fsdp=-1)
    lora = dataclasses.replace(config, tune=LORA, optim=optim, mesh=mesh, run_dir=str(tmp_path / "run"))
    frozen = frozen_of(TINY.model, LORA)
    for last in (run(lora), run(dataclasses.replace(lora, resume=True, num_steps=3, mesh=MeshConfig()))):
        after = flat(checkpoint.restore_params(last))
        assert frozen < set(after)
        for name in frozen:
            assert same_bits(after[name], before[name].astype(jnp.bfloat16)), name
        for name in before.keys() - frozen:
            assert after[name].dtype == jnp.float32
            assert not np.array_equal(after[name], before[name].astype(jnp.bfloat16)), name
        assert all(np.any(x) for name, x in after.items() if name.endswith("_lora_b"))
    policy = Policy.load(last)
    images = {name: np.zeros((48, 48, 3), np.uint8) for name in ("top", "tool")}
    assert np.isfinite(policy.infer({"images": images, "state": np.zeros(6), "prompt": "reach the puck"})).all()
    record = convert(last, tmp_path / "lerobot", "lerobot", merge_lora=True, verify_with="ours", tolerance=1e-5)
    assert record["actions"]["agree"]


def test_a_state_has_no_optimizer_state_and_no_average_of_what_is_frozen(config):
    for tune in (TuneConfig("expert"), LORA):
        state = built(dataclasses.replace(config, tune=tune))[1].shapes
        trained, frozen = flat(state.params).keys(), flat(state.frozen).keys()
        assert not trained & frozen
        assert flat(state.ema).keys() == trained
        mu = state.opt_state[1][0].mu
        assert flat(mu).keys() == trained
        assert {x.dtype for x in flat(state.frozen).values()} == {jnp.dtype("bfloat16")}


def test_adapters_start_without_effect_on_weights_that_have_none(config):
    resolved, program = built(dataclasses.replace(config, tune=LORA))
    weights = flat(first_weights(resolved, program.shapes))
    adapters = {name: x for name, x in weights.items() if "_lora_" in name}
    assert len(adapters) == 20
    assert all(np.any(x) != name.endswith("_b") for name, x in adapters.items())
    before = flat(checkpoint.restore_params(config.init_from))
    assert weights.keys() - adapters.keys() == before.keys()
    assert all(same_bits(weights[name], x.astype(weights[name].dtype)) for name, x in before.items())


def test_random_weights_are_not_frozen(config, tmp_path):
    fresh = dataclasses.replace(config, tune=TuneConfig("vision_frozen"), run_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"would stay random, such as image_encoder.*--init-from"):
        run(dataclasses.replace(fresh, init_from=None))
    with pytest.raises(ValueError, match="would stay random"):
        run(dataclasses.replace(fresh, init_parts=("backbone",)))


@pytest.mark.parametrize(
    ("tune", "optim", "bytes_each"),
    [
        ("full", "adamw", (4, 8, 4, 0)),
        ("full", "adamw, bfloat16 moment and average", (4, 6, 2, 0)),
        ("full", "adamw_8bit, no average", (4, 2.036, 0, 0)),
        ("full", "adafactor, no moment, bfloat16 average", (4, 0.1824, 2, 0)),
        ("vision_frozen", "adamw", (4, 8, 4, 2)),
    ],
)
def test_bytes_a_parameter_at_full_size(tune, optim, bytes_each):
    measured = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "memory.py"))
    config = TrainConfig(
        policy=PolicyConfig(robot="aloha", model=PI0),
        tune=measured["TUNES"][tune],
        optim=measured["OPTIMIZERS"][optim],
    )
    found = measured["measure"](config)
    learned, frozen = found["trained"] // 4, found["frozen"] // 2
    assert learned + frozen == sum(x.size for x in jax.tree.leaves(weights_of(PI0)))
    for name, count, each in zip(
        ("trained", "optimizer", "average", "frozen"), (*[learned] * 3, frozen), bytes_each, strict=True
    ):
        assert found[name] == pytest.approx(each * count, rel=1e-3, abs=16), name
