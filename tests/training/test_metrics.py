"""Rows are exact, in order and complete; a run that diverges stops at the step where it happened."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from pi0_jax import flops
from pi0_jax.config import PolicyConfig, TrainConfig
from pi0_jax.training.guard import Diverged
from pi0_jax.training.metrics import Reporter, drop_rows_after, seconds_at_peak
from pi0_jax.training.resolve import resolve
from tests.conftest import tiny_config


def metrics(loss: float, **others: float):
    return {name: jnp.float32(x) for name, x in ({"grad_norm": 1.0, "param_norm": 1.0, "loss": loss} | others).items()}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reporter(folder, start=0) -> Reporter:
    folder.mkdir(exist_ok=True)
    return Reporter(folder, start=start, num_steps=10, batch_size=4, log_every=2)


def test_every_update_has_a_row_that_reads_back_exactly(tmp_path):
    losses = np.random.default_rng(0).standard_normal(5).astype(np.float32)
    with reporter(tmp_path) as report:
        for step, loss in enumerate(losses, 1):
            report.push(step, metrics(loss))
        report.flush()
        report.write(5, {"validation_loss": 1 / 3})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 5]
    np.testing.assert_array_equal([np.float32(row["loss"]) for row in rows(tmp_path)[:5]], losses)
    assert rows(tmp_path)[-1] == {"step": 5, "validation_loss": 1 / 3}


def test_waiting_for_batches_is_kept_apart_and_reported_with_its_stage(tmp_path, caplog):
    gauges = {"input_wait": 0.6, "input_columns": 0.1, "input_pictures": 0.7, "input_transform": 0.2}
    with (
        Reporter(tmp_path, start=0, num_steps=4, batch_size=4, log_every=2, gauges=lambda: dict(gauges)) as report,
        caplog.at_level("WARNING", "pi0_jax"),
    ):
        for step in range(1, 5):
            report.push(step, metrics(1.0))
        report.flush()
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing] == [1, 2, 3, 4]
    assert {row["input_wait"] for row in timing} == {0.6}
    assert all("input_wait" not in row for row in rows(tmp_path))
    assert (
        "60 % of the time was spent waiting for batches, 70 % of whose preparation is reading pictures" in caplog.text
    )
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert {"input_wait", "input_pictures"} <= tags


def test_event_files_hold_the_same_numbers_and_mark_where_a_run_was_taken_up(tmp_path):
    for start in (0, 2):
        with reporter(tmp_path / str(start), start) as report:
            for step in range(start + 1, start + 5):
                report.push(step, metrics(step / 8))
            report.flush()
            report.write(start + 4, {"validation_loss": 0.5})
    first, second = (events(tmp_path / str(start)) for start in (0, 2))
    points = [(e.step, v.simple_value) for e in first for v in e.summary.value if v.tag == "loss"]
    assert points == [(2, 0.25), (4, 0.5)]
    assert [v.tag for v in first[-1].summary.value] == ["validation_loss"]
    assert [e.step for e in second if e.HasField("session_log")] == [3]


def events(folder: Path) -> list[Event]:
    (file,) = folder.glob("events.out.tfevents.*")
    content, found = file.read_bytes(), []
    while content:  # length, its checksum, event, its checksum
        (length,) = struct.unpack("Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_a_full_disk_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with reporter(tmp_path) as report:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(OSError, match=r"cannot write metrics to .*metrics\.jsonl: .*--resume"):
                report.write(1, {"validation_loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_update_is_reported_when_the_next_one_is_pushed(tmp_path):
    with reporter(tmp_path) as report:
        report.push(1, metrics(1.0))
        assert rows(tmp_path) == []
        report.push(2, metrics(2.0))
        assert [row["step"] for row in rows(tmp_path)] == [1]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_with_its_name_and_step(tmp_path, name, value):
    with reporter(tmp_path) as report:
        report.push(1, metrics(1.0))
        report.push(2, metrics(1.0) | {name: jnp.float32(value)})
        with pytest.raises(Diverged, match=f"{name} is {value} at step 2"):
            report.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint_and_a_row_cut_short(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}, "loss": 0.5}}\n' for i in (1, 2, 2, 3, 4)) + '{"step": 2, "lo')
    drop_rows_after(file, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2]
    with reporter(tmp_path, start=2) as report:
        report.push(3, metrics(0.25))
        report.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2, 3]


def test_use_of_the_devices_and_the_most_memory_are_in_the_log(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    with Reporter(tmp_path, start=0, num_steps=2, batch_size=4, log_every=2, ideal_seconds=1e-9) as report:
        for step in (1, 2):
            report.push(step, metrics(1.0))
        report.flush()
    assert re.search(r"samples/s [\d.e+]+, MFU [\d.e-]+", caplog.text)
    shown = {value.tag: value.simple_value for event in events(tmp_path) for value in event.summary.value}
    assert 0 < shown["mfu"] < 1
    assert 0.1 < shown["peak_memory_GB"] < 1000

    policy = PolicyConfig(robot="tabletop", model=tiny_config(remat="full", cameras=()))
    run = resolve(TrainConfig(policy=policy, batch_size=24))
    assert seconds_at_peak(run) is None
    assert "MFU is left out: the peak of a device of kind 'cpu' is not known" in caplog.text
    monkeypatch.setattr("pi0_jax.flops.peak", lambda kind: 1e12)
    work = flops.training(dataclasses.replace(policy.model, remat="none"), policy.objective)
    assert seconds_at_peak(run) == pytest.approx(work * 24 / 8e12)


def test_without_a_terminal_there_are_lines_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    with reporter(tmp_path) as report:
        for step in (1, 2, 3):
            report.push(step, metrics(0.5, grad_norm=2.0))
        report.flush()
    assert [record.message.split(", samples/s")[0] for record in caplog.records] == [
        "step 2 of 10: loss 0.5, grad_norm 2"
    ]
    assert "left 00:0" in caplog.text
