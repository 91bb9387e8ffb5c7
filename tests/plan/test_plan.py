"""A plan says what the compiled program and its real arrays take."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
import tyro

from pi0_jax import cli, flops
from pi0_jax.config import MeshConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.config.replace import replace
from pi0_jax.plan import devices, hlo
from pi0_jax.plan.commands import describe
from pi0_jax.plan.compile import build_program, update_shapes
from pi0_jax.plan.cost import Plan, kept_for_backward, make_plan
from pi0_jax.plan.devices import JAX_SHARE, Device, find_devices
from pi0_jax.plan.fit import REMATS, alternatives, find_fitting
from pi0_jax.plan.hlo_collectives import traffic
from pi0_jax.training import sharding
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.training.test_sharding import held

MODEL = tiny_config("pi0", cameras=("top",), action_dim=8, depth=4, dtype="float32", remat="full")
CONFIG = TrainConfig(
    policy=PolicyConfig(robot="tabletop", model=MODEL),
    optim=OptimConfig(name="adamw", warmup_steps=2, ema_decay=0.9),
    mesh=MeshConfig(data=1, fsdp=-1),
    batch_size=64,
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(CONFIG)


@pytest.fixture(scope="module")
def known() -> Plan:
    """On GPUs whose data sheet is known, without a compiler."""
    return make_plan(CONFIG, "h100:8", compiled=False)


def test_what_a_plan_says_is_held_is_what_the_arrays_hold(plan):
    run, program, _ = build_program(CONFIG, jax.devices())
    state = program.start(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), program.shapes.params))
    for name, part in (
        ("parameters", state.params),
        ("optimizer", (state.step, state.opt_state)),
        ("average", state.ema),
    ):
        assert plan.resident_bytes[name] == max(held(part)), name
    batch = jax.device_put(random_batch(MODEL, 64), run.batch_placement)
    assert plan.resident_bytes["batch"] == max(held(batch))


def test_the_peak_of_a_plan_is_the_compilers(plan):
    run, program, batch = build_program(CONFIG, jax.devices())
    lowered = program.update.lower(*update_shapes(run, program, batch))
    memory = lowered.compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert not plan.estimated
    assert plan.peak == pytest.approx(total, rel=0.1)
    assert sum(plan.resident_bytes.values()) == pytest.approx(memory.argument_size_in_bytes, rel=0.1)


def test_what_the_backward_pass_keeps_shrinks_with_the_policy_and_grows_with_the_batch():
    kept = [kept_for_backward(replace(CONFIG, {"policy.model.remat": name}).policy, CONFIG.tune) for name in REMATS]
    assert kept == sorted(kept, reverse=True)
    # At least each layer's input, float32: 4 image tokens and the prompt, state and actions.
    prefix, suffix = MODEL.prompt_length + 4, 1 + MODEL.action_horizon
    least = 4 * (MODEL.depth - 1) * (prefix * MODEL.language.width + suffix * MODEL.action.width)
    assert least < kept[-1] < 4 * least


def test_work_is_the_matrix_products_of_a_sample_times_the_batch(plan):
    assert plan.flops == pytest.approx(64 / 8 * flops.training(MODEL, CONFIG.policy.objective), rel=0.02)


def program(function, *shapes: tuple[int, ...]):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("x")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec)) for shape in shapes]
    return jax.jit(mapped).lower(*arrays).compile().as_text()


@pytest.mark.parametrize(
    ("kind", "function", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "x", tiled=True), 800 * 4 * 7 / 8),
        ("all-reduce", lambda x: jax.lax.psum(x, "x"), 2 * 100 * 4 * 7 / 8),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "x", tiled=True), 96 * 4 * 7 / 8),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), 96 * 4 * 7 / 8),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), 100 * 4),
    ],
)
def test_bytes_of_each_collective(kind, function, sent):
    size = 768 if kind in ("reduce-scatter", "all-to-all") else 800
    found = traffic(hlo.parse(program(function, (size,))))
    assert found[kind] == pytest.approx(sent)
    assert sum(found.values()) == found[kind]


def test_a_collective_in_a_loop_in_a_loop_counts_every_round():
    def rounds(x):
        def inner(carry, _):
            return jax.lax.psum(jnp.sin(carry), "x"), None

        def outer(carry, _):
            return jax.lax.scan(inner, carry, None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    assert traffic(hlo.parse(program(rounds, (800,))))["all-reduce"] == pytest.approx(15 * 2 * 100 * 4 * 7 / 8)


def test_what_an_update_sends_under_fsdp_is_its_weights_and_gradients(plan):
    size = plan.resident_bytes["parameters"] * 8
    assert 2 * size < sum(plan.compiled.comm_bytes.values()) < 8 * size


TPU_TEXT = """
%async.1 (p: bf16[8,16]) -> bf16[128,16] {
  %all-gather.1 = bf16[128,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=16,'b'=2] {'a'}, dimensions={0}
}

%async.2 (p: bf16[8,16]) -> bf16[128,16] {
  %all-gather.2 = bf16[128,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=16,'b'=2] {'a'}, dimensions={0}
}

%condition (c: (u32[], f32[4])) -> pred[] {
  %bound = u32[]{:T(128)} constant(27)
  ROOT %compare = pred[] compare(%index, %bound), direction=LT
}

%body (c: (u32[], f32[4])) -> (u32[], f32[4]) {
  %f.1 = bf16[128,16] fusion(%x), kind=kCustom, calls=%async.1
  %f.2 = bf16[128,16] fusion(%x), kind=kCustom, calls=%async.2
  %s = (bf16[72]{0}, bf16[72]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (u32[], f32[4]) while(%tuple), condition=%condition, body=%body
}
"""  # noqa: E501


def test_pieces_of_one_collective_over_fusions_of_a_tpu_count_once():
    found = traffic(hlo.parse(TPU_TEXT))
    assert found["all-gather"] == 27 * 128 * 16 * 2 * 15 / 16
    assert found["collective-permute"] == pytest.approx(27 * 72 * 2, rel=0.05)  # its two words count too
    with pytest.raises(ValueError, match="rounds are not known"):
        traffic(hlo.parse(TPU_TEXT.replace("constant(27)", "parameter(1)")))


def test_ways_to_need_less_memory_come_in_order_of_what_they_change():
    config = dataclasses.replace(replace(CONFIG, {"policy.model.remat": "matmuls"}), mesh=MeshConfig(data=-1))
    ways = list(alternatives(config, sharding.make_mesh(config.mesh), lambda config: 0.0))
    assert [flags.split(" --")[-1] for flags, _ in ways] == [
        "mesh.fsdp -1",
        "policy.model.remat gate_up",
        "policy.model.remat full",
        "grad-accum-steps 2",
        "grad-accum-steps 4",
        "grad-accum-steps 8",
        "optim.ema-dtype bfloat16",
        "optim.name adamw_8bit",
        "optim.ema-decay None",
        "tune.recipe lora",
    ]
    assert "--optim" not in ways[-1][0]
    assert tyro.cli(TrainConfig, default=config, args=ways[-1][0].split()) == ways[-1][1]
    ways = list(alternatives(config, sharding.make_mesh(config.mesh), lambda config: float(config.grad_accum_steps)))
    assert "--grad-accum-steps 8" in ways[5][0]
    assert all("--grad-accum-steps" not in flags for flags, _ in ways[6:])


def test_the_nearest_settings_that_fit_are_found(monkeypatch, known):
    monkeypatch.setattr("pi0_jax.plan.fit.make_plan", functools.partial(make_plan, compiled=False))
    config = dataclasses.replace(replace(CONFIG, {"policy.model.remat": "none"}), mesh=MeshConfig(data=-1))
    monkeypatch.setitem(devices.GPUS, "h100", Device(1.01 / JAX_SHARE * known.peak, 1e12, 1e12, 1e11))
    first = make_plan(config, "h100:8", compiled=False)
    assert not first.fits
    found = find_fitting(config, first)
    assert found is not None
    assert found[1].fits
    assert found[0] == "--mesh.data 1 --mesh.fsdp -1 --policy.model.remat full"
    # Of what is left beside the flags above, nothing is enough.
    least = dataclasses.replace(CONFIG, batch_size=8, optim=OptimConfig(ema_decay=None, name="adamw_8bit"))
    assert find_fitting(least, known._replace(device=known.device._replace(memory=0.0))) is None


def test_a_plan_is_printed_with_what_is_compiled_and_what_is_estimated(plan, known):
    text = describe(plan)
    assert "8 devices, mesh data 1 x fsdp 8" in text
    assert "of the compiler" in text
    text = describe(known)
    assert re.search(r"temporaries .*estimated", text)
    assert re.search(r"peak .* of 84\.\d+ GB: fits", text)
    assert "a step takes at least" in text
    assert "network" in text
    unknown = dict.fromkeys(known.compiled.comm_bytes, float("nan"))
    unread = describe(known._replace(compiled=known.compiled._replace(comm_bytes=unknown)))
    assert "not known  the compiler cannot print this program" in unread
    assert "nan" not in unread
    assert "network" not in unread


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.74, "fits"), (0.76, "fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"), (0.96, "DOES NOT FIT")],
)
def test_what_fits_is_what_jax_takes_or_can_be_told_to_take(share, verdict, known):
    assert known.device is not None
    plan = known._replace(compiled=known.compiled._replace(peak=share * known.device.memory))
    assert re.search(r"peak .* GB: (.*)", describe(plan))[1] == verdict
    assert plan.fits == verdict.startswith("fits")


def test_the_command_takes_the_flags_of_training(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        "from pi0_jax.config import *\nfrom tests.plan.test_plan import CONFIG\nconfig = CONFIG\n"
    )
    monkeypatch.setattr("pi0_jax.plan.commands.make_plan", functools.partial(make_plan, compiled=False))
    command = ["plan", str(tmp_path / "config.py"), "--topology", "h100:8", "--batch-size", "16"]
    assert cli.main(command) == 0
    assert "h100:8: 8 devices, mesh data 1 x fsdp 8 x tensor 1, batch 16" in capsys.readouterr().out
    assert cli.main([*command[:3], "h1000:8"]) == 1
    assert "v5e:4x8" in capsys.readouterr().err


def test_a_plan_for_a_tpu_without_its_compiler_or_of_no_shape_says_what_to_do(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("cannot generate TPU topology")

    monkeypatch.setattr("pi0_jax.compat.tpu_devices", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
        make_plan(CONFIG, "v5e:4x4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"no topology v5e:4: cannot generate.*2x2, 2x4, 4x4"):
        make_plan(CONFIG, "v5e:4")


def test_a_tpu_that_is_not_there_is_compiled_for():
    pytest.importorskip("libtpu", reason="plans for TPUs need the extra tpu")
    found = make_plan(dataclasses.replace(CONFIG, batch_size=8), "v5e:2x2")
    assert not found.estimated
    assert found.mesh["fsdp"] == 4
    assert found.temporaries > 0
    assert found.cost is not None
    assert found.cost.cycles > 0
    assert sum(found.compiled.comm_bytes.values()) > 2 * found.resident_bytes["parameters"]
    for topology, chips in {"v4:2x2x1": 4, "v5p:2x2x2": 8, "v6e:1x1": 1}.items():
        assert len(find_devices(topology)[1]) == chips
