"""Microbatches give the update of the whole batch; an update that is not finite changes nothing."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from pi0_jax import pi0
from pi0_jax.config import Compact, ConditionDropout, Gaussian, MeshConfig, Shortcut, Sinkhorn, Tokens
from pi0_jax.training import sharding
from pi0_jax.training.guard import Diverged, Guard, skipped_before
from pi0_jax.training.step import microbatches, value_and_gradient
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.training.common import harness

FSDP = {"mesh": MeshConfig(data=2, fsdp=4), "devices": 8}
DROPS = Gaussian(draws=2, dropout=ConditionDropout(prompt=0.3, both=0.3), mask_padded_dims=True, max_delay=3)
COUPLED = Gaussian(draws=2, coupling=Sinkhorn(), dropout=ConditionDropout(images=0.5))
COMPACT = {"head": Compact(width=32, depth=2, time_width=16)}


@pytest.mark.parametrize(
    ("learned", "changes"),
    [(DROPS, {}), (COUPLED, COMPACT), (Shortcut(), COMPACT), (Tokens(), {})],
    ids=["masks, drops and delays", "coupling", "shortcuts", "bins"],
)
def test_microbatches_add_up_to_the_loss_and_gradient_of_the_batch(learned, changes):
    config = tiny_config("pi0", cameras=(), **changes)
    objective, random = pi0.make_objective(learned, config), np.random.default_rng(0)
    batch = jax.tree.map(jnp.asarray, random_batch(config, 16))
    shapes = meta.unbox(jax.eval_shape(objective.network.init, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape, np.float32)), shapes)

    @functools.partial(jax.jit, static_argnums=0)
    def computed_in(count: int):
        draws, total = objective.draw(batch, jax.random.key(1), 0)
        return value_and_gradient(lambda params, some: objective.loss(params, some, total), params, draws, count)

    ((value, _), gradient), ((other, _), added) = computed_in(1), computed_in(4)
    plain = jax.jit(lambda params, batch, key: pi0.loss(objective, params, batch, key)[0])
    assert value == pytest.approx(float(plain(params, batch, jax.random.key(1))), rel=1e-5)
    assert other == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), gradient, added)
    # The test would notice microbatches that divide by their own count.
    counts = np.asarray(microbatches(batch.step_mask, 4)).sum((1, 2))
    assert len(set(counts)) > 1


def test_microbatches_on_eight_devices_give_the_weights_of_one_device():
    config = tiny_config("pi0", cameras=("top",))
    batches = [random_batch(config, 16, seed) for seed in range(3)]
    one, eight = harness(config), harness(config, **FSDP, grad_accum_steps=2)
    (state, single), (divided, rows) = one.run(one.start(), batches), eight.run(eight.start(), batches)
    for a, b in zip(single, rows, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(state.weights), jax.tree.leaves(divided.weights), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    program = eight.update.lower(np.uint32(0), eight.start(), eight.place(batches[0])).compile().as_text()
    carried = [line for line in program.splitlines() if re.search(r" while\(", line)]
    assert any("f32[2,2,6,48]" in line for line in carried)  # feed-forward of the language expert, its embed axis by 4
    assert not any("f32[2,2,24,48]" in line for line in carried)


def test_a_batch_that_does_not_divide_into_microbatches_is_refused():
    mesh = sharding.make_mesh(MeshConfig())
    sharding.batch_sharding(mesh, 32, 4)
    with pytest.raises(
        ValueError,
        match=r"32 does not divide over 8 devices in 3 microbatches each.*--batch-size 24.*--grad-accum-steps",
    ):
        sharding.batch_sharding(mesh, 32, 3)


@pytest.mark.parametrize("where", [{}, FSDP | {"grad_accum_steps": 2}], ids=["one device", "fsdp"])
def test_an_update_that_is_not_finite_leaves_weights_optimizer_and_average_as_they_were(where):
    config = tiny_config("pi0", cameras=("top",))
    tiny, good = harness(config, **where), random_batch(config, 16)
    poisoned = good.actions.at[3, 1, 0].set(np.nan)  # one number of one example, on one device
    bad = good._replace(actions=poisoned, step_mask=jnp.ones_like(good.step_mask))
    state, _ = tiny.run(tiny.start(), [good])
    before = jax.tree.map(np.array, state)
    state, (row,) = tiny.run(state, [bad])
    assert row["skipped"] == 1
    assert np.isnan(row["loss"])
    assert np.isfinite(row["param_norm"])
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, before._replace(step=0), jax.tree.map(np.array, state)._replace(step=0))
    state, (row,) = tiny.run(state, [good])
    assert row["skipped"] == 0
    assert any(
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before.params, state.params)), strict=True)
    )


def test_skipped_updates_are_counted_in_a_row_and_in_all_and_end_the_run(caplog):
    good, bad = ({"loss": x, "grad_norm": x, "param_norm": 1.0} for x in (1.0, float("nan")))
    guard = Guard(2, 4)
    for step, values in enumerate([bad, bad, good, bad, bad], 1):
        guard.see(step, values)
    assert "loss is nan at step 5: update skipped (2 consecutive, 4 in total)" in caplog.text
    with pytest.raises(Diverged, match="loss is nan at step 6, after skipping 2 consecutive updates, 4 in total"):
        guard.see(6, bad)
    guard = Guard(9, 4, before=(0, 4))
    guard.see(7, good)
    with pytest.raises(Diverged, match="step 8, after skipping 0 consecutive updates, 4 in total"):
        guard.see(8, bad)
    with pytest.raises(Diverged, match="param_norm is inf"):
        Guard(9, 9).see(1, good | {"param_norm": float("inf")})


def test_a_resumed_run_knows_what_was_skipped_before(tmp_path):
    rows = tmp_path / "metrics.jsonl"
    assert skipped_before(rows, 5) == (0, 0)
    skipped = [1, 0, 1, 1, 1]
    lines = [json.dumps({"step": step, "loss": float("nan"), "skipped": float(s)}) for step, s in enumerate(skipped, 1)]
    rows.write_text("\n".join([*lines[:4], '{"step": 4, "validation_loss": 1.0}', lines[4], '{"ste']))
    assert skipped_before(rows, 4) == (2, 3)
    assert skipped_before(rows, 2) == (0, 1)
