"""The largest batch that fits is found with few measurements, and is the largest."""

from __future__ import annotations

import dataclasses
import re

import pytest

from pi0_jax import cli
from pi0_jax.config import MeshConfig, TrainConfig
from pi0_jax.errors import UserError
from pi0_jax.plan import devices
from pi0_jax.plan.compile import Compiled
from pi0_jax.plan.cost import Plan
from pi0_jax.plan.devices import JAX_SHARE, Device, find_devices
from pi0_jax.plan.largest_batch import PER_DEVICE, find_largest, search
from tests.plan.test_plan import CONFIG

GUESS = (8, 58.0), (16, 64.0)


@pytest.mark.parametrize(
    ("measure", "largest", "most"),
    [
        (lambda n: 52 + 0.75 * n, 32, 2),  # the guess is right: that one and the next
        (lambda n: 50 + 0.25 * n, 112, 4),  # a third of its slope
        (lambda n: 60 + 3.0 * n, 0, 3),  # none
        (lambda n: 50 + 0.2 * n + (10 if n >= 72 else 0), 88, 8),  # a jump below the answer
        (lambda n: 50 + 0.2 * n + (100 if n >= 72 else 0), 64, 8),  # and one that no line meets
        (lambda n: 10.0 + (n / 16) ** 2, 128, 8),
    ],
)
def test_the_largest_multiple_that_fits_is_measured_and_so_is_the_next(measure, largest, most):
    seen = []

    def counted(n: int) -> float:
        assert n % 8 == 0
        assert n not in seen
        seen.append(n)
        return measure(n)

    assert search(counted, 78.0, 8, GUESS) == largest
    assert {largest or 8, largest + 8} <= set(seen)
    assert measure(largest + 8) > 78.0 >= measure(largest or -100)
    assert len(seen) <= most


@pytest.fixture
def planned(monkeypatch):
    """Plans of a cheap stand-in, 1 GB on each device and 10 MB per example of all; and the seconds of a compiler."""

    def make(config: TrainConfig, topology: str, *, compiled: bool, recompute: bool) -> Plan:
        assert not recompute
        peak = 1e9 + 1e7 * config.batch_size
        mesh = {name: max(getattr(config.mesh, name), 1) for name in ("data", "fsdp", "tensor")}
        device = find_devices(topology)[2]
        return Plan(
            topology, device, mesh, config.batch_size, {}, not compiled, 1e12, 1e9, Compiled(peak, 0.0, {}, [], 7.0)
        )

    monkeypatch.setattr("pi0_jax.plan.largest_batch.make_plan", make)
    monkeypatch.setattr("pi0_jax.plan.largest_batch.estimates", lambda devices, device: False)
    return lambda memory: monkeypatch.setitem(devices.GPUS, "h100", Device(memory / JAX_SHARE, 1e12, 1e12, 1e11))


def test_batches_divide_over_devices_and_microbatches(planned):
    planned(1e9 + 200 * 1e7)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=2, tensor=2), grad_accum_steps=2)
    seen = []
    found = find_largest(config, "h100:8", lambda plan, memory: seen.append(plan.batch_size))
    assert found is not None
    assert found.batch_size == 3 * PER_DEVICE * 4 * 2
    assert seen == [192, 256]


def test_a_machine_of_unknown_memory_is_refused():
    with pytest.raises(UserError, match="--topology h100:1"):
        find_largest(CONFIG, None, lambda plan, memory: None)


def test_the_command_prints_each_try_and_the_flag(planned, tmp_path, capsys):
    (tmp_path / "config.py").write_text("from tests.plan.test_plan import CONFIG\nconfig = CONFIG\n")
    command = ["plan", str(tmp_path / "config.py"), "--topology", "h100:8", "--largest-batch"]
    planned(1e9 + 130 * 1e7)
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert re.search(r"batch +128 .*compiled in 7 s: fits\n +batch +192 .*compiled in 7 s: does not fit", text)
    assert "--batch-size 128" in text
    assert "GB: fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in text
    planned(1e9)
    assert cli.main(command) == 0
    assert "Not even 64 examples fit" in capsys.readouterr().out
