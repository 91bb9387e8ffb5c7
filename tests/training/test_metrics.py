"""Rows are exact, in order and complete; a run that diverges stops at the step where it happened."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.training.metrics import Diverged, Reporter, drop_rows_after


def metrics(loss: float, **others: float):
    return {name: jnp.float32(x) for name, x in ({"grad_norm": 1.0, "param_norm": 1.0, "loss": loss} | others).items()}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reporter(folder, start=0) -> Reporter:
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
    assert list(tmp_path.glob("events.out.tfevents.*"))


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


def test_without_a_terminal_there_are_lines_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    with reporter(tmp_path) as report:
        for step in (1, 2, 3):
            report.push(step, metrics(0.5, grad_norm=2.0))
        report.flush()
    assert [record.message.split(", samples/s")[0] for record in caplog.records] == [
        "step 2 of 10: loss 0.5, grad_norm 2"
    ]
    assert "left 00:00:0" in caplog.text
