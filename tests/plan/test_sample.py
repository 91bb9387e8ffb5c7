"""Plans of a chunk, and programs compiled for accelerators that are not there: kernels and bytes of a few layers."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from pi0_jax import cli, flops
from pi0_jax.config import PI0, Autoregressive, Joint, MeshConfig, OptimConfig, PolicyConfig, TrainConfig
from pi0_jax.flops import GPUS, TPUS
from pi0_jax.inference.sampler import Inputs, sampling_function
from pi0_jax.model import attention, layers, target
from pi0_jax.model.fold import folded_shapes
from pi0_jax.objective import make_objective
from pi0_jax.plan import hlo
from pi0_jax.plan.commands import describe, describe_sample
from pi0_jax.plan.compile import Compiled
from pi0_jax.plan.cost import make_plan
from pi0_jax.plan.devices import CHIPS, has_gpu_compiler
from pi0_jax.plan.kernels import kernels
from pi0_jax.plan.sample import SamplePlan, make_sample_plan, observation_shapes
from pi0_jax.sampler import Euler, Greedy
from tests.conftest import tiny_config
from tests.plan.test_kernels import TEXT, TPU_TEXT

FEW_LAYERS = dataclasses.replace(
    PI0, depth=2, vision=dataclasses.replace(PI0.vision, depth=1), vocab_size=1024, cameras=PI0.cameras[:1]
)
"""Of full width: two layers of both experts, one of the image encoder."""
POLICY = PolicyConfig(robot="aloha", model=FEW_LAYERS, sampler=Euler(2))

needs_gpu_compiler = pytest.mark.skipif(
    not has_gpu_compiler(), reason="XLA's compiler for NVIDIA GPUs is not installed: extra cuda12, no GPU needed"
)


def work() -> int:
    """FLOP of the program, counted before a compiler sees it."""
    objective = make_objective(POLICY.objective, FEW_LAYERS)
    sample = sampling_function(objective, POLICY, FEW_LAYERS, POLICY.sampler)
    inputs = Inputs(observation_shapes(FEW_LAYERS, 1), jax.random.key(0)[None])
    # No kernels, whose products are not counted, and lengths aligned as for them.
    with target.tracing_for("tpu"):
        return flops.count(sample, folded_shapes(objective.network), inputs)


@needs_gpu_compiler
def test_kernels_and_bytes_of_a_few_layers_on_a_gpu(monkeypatch):
    # Sums and rotations that are matrix products on TPUs alone.
    monkeypatch.setattr("pi0_jax.model.attention._attended_on_tpu", attention._attended)
    monkeypatch.setattr("pi0_jax.model.layers.rotate_folded", layers.rotate)
    plan = make_sample_plan(POLICY, "h100:1")
    assert plan.cost.kernels <= 90
    # Weights of the language model and the image encoder once, of the action expert twice, and 0.4 GB besides.
    assert plan.weights < plan.cost.bytes < 0.8e9
    assert plan.cost.flops == pytest.approx(work(), rel=0.01)
    assert plan.weights < plan.compiled.peak < 1.2 * plan.weights
    text = describe_sample(plan)
    assert "product: model/layers.py:" in text


def test_kernels_and_bytes_of_a_few_layers_on_a_tpu():
    pytest.importorskip("libtpu", reason="plans for TPUs need the extra tpu")
    plan = make_sample_plan(POLICY, "v6e:1x1")
    assert 0.1e6 < plan.cost.cycles < 1.5e6
    assert plan.cost.flops == pytest.approx(work(), rel=0.01)


def test_the_program_that_decodes_a_chunk_on_a_tpu_is_read():
    pytest.importorskip("libtpu", reason="plans for TPUs need the extra tpu")
    # Of a size at which the compiler would move scatters and gathers of single numbers to another core.
    size = {"vocab_size": 4096, "action_horizon": 50, "action_dim": 32}
    model = tiny_config("pi0_fast", cameras=("top",), depth=1, **size)
    policy = PolicyConfig(
        robot="none", model=model, objective=Autoregressive(), sampler=Greedy(), normalization="quantile"
    )
    plan = make_sample_plan(policy, "v6e:1x1", cameras=1)
    assert plan.written == "50 codes"
    assert plan.cost.cycles > 0


@needs_gpu_compiler
def test_a_policy_that_writes_subtasks_is_planned_with_one():
    joint = Joint(codec=None, text_tokens=16)
    model = tiny_config("pi05", cameras=("top",), depth=1)
    policy = PolicyConfig(robot="none", model=model, objective=joint, normalization="quantile")
    alone = make_sample_plan(policy, "h100:1", cameras=1)
    writes = make_sample_plan(dataclasses.replace(policy, subtask_every=1), "h100:1", cameras=1)
    assert (alone.written, writes.written) == (None, "12 tokens of a subtask")
    assert writes.cost.kernels > alone.cost.kernels + 12


@needs_gpu_compiler
def test_an_update_on_gpus_that_are_not_there_is_compiled():
    model = tiny_config("pi0", cameras=("top",), action_dim=8, depth=1, remat="none")
    config = TrainConfig(
        policy=PolicyConfig(robot="tabletop", model=model),
        optim=OptimConfig(ema_decay=None, warmup_steps=2),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=4,
    )
    plan = make_plan(config, "h100:2")
    assert not plan.estimated
    assert plan.mesh["fsdp"] == 2
    assert sum(plan.compiled.comm_bytes.values()) > plan.resident_bytes["parameters"]
    assert plan.cost is not None
    assert plan.cost.kernels > 100
    text = describe(plan)
    assert "of the compiler" in text
    assert "estimated" not in text
    assert "an assumption" in text


def test_every_gpu_of_the_data_sheets_can_be_described_to_the_compiler():
    assert CHIPS.keys() == GPUS.keys()


def test_a_plan_of_a_chunk_is_printed_with_launches_or_cycles():
    def planned(text: str, name: str) -> SamplePlan:
        device = (GPUS | TPUS)[name]
        found = kernels(hlo.parse(text), device)
        compiled = Compiled(2e9, 1e9, {}, found, 3.0)
        return SamplePlan(f"{name}:1", device, ("top", "wrist"), 1, 48, 1e9, compiled)

    text = describe_sample(planned(TEXT, "h100"))
    assert text.startswith("a chunk on one h100: 2 cameras, a prompt of 48 tokens")
    assert "peak                     2.000 GB  of 84.826 GB: fits" in text
    assert "22 kernels take at least" in text
    assert "if each takes 2 µs to start, which is an assumption" in text
    assert "product: model/layers.py:9 < model/gemma.py:7" in text
    assert "0.002 M cycles, as the compiler estimates them" in describe_sample(planned(TPU_TEXT, "v6e"))


def test_what_cannot_be_planned_says_what_to_do(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        "from pi0_jax.config import *\nfrom tests.plan.test_plan import CONFIG\nconfig = CONFIG\n"
    )
    command = ["plan", str(tmp_path / "config.py"), "--sample"]
    monkeypatch.setattr("pi0_jax.plan.devices.has_gpu_compiler", lambda: False)
    assert cli.main([*command, "--topology", "h100:1"]) == 1
    assert "pip install -e '.[cuda12]'" in capsys.readouterr().err
    assert cli.main(command) == 1
    assert "--topology h100:1" in capsys.readouterr().err
    assert cli.main([command[0], command[1], "--cameras", "2"]) == 1
    assert "--sample --cameras 2" in capsys.readouterr().err
    assert cli.main([*command, "--topology", "h100:1", "--chunks", "0"]) == 1
    assert "--chunks 0" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path), "--sample", "--topology", "h100:1"]) == 1
    assert "config.py" in capsys.readouterr().err
