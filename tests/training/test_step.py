"""An update learns, averages and counts as it should, and gives the same numbers on any number of devices."""

from __future__ import annotations

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pi0_jax import compat
from pi0_jax.config import (
    Compact,
    ConditionDropout,
    Gaussian,
    Independent,
    MeshConfig,
    OptimalTransport,
    OptimConfig,
    Shortcut,
    Sinkhorn,
)
from pi0_jax.training import sharding
from pi0_jax.training.state import create, join, split
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.training.common import OPTIM, harness

BLIND = tiny_config("pi0", cameras=())
"""Without an image encoder, which takes most of the time to compile."""


COMPACT = Compact(width=32, depth=2, time_width=16)


def changed(**fields) -> OptimConfig:
    return dataclasses.replace(OPTIM, **fields)


FSDP = {"mesh": MeshConfig(data=2, fsdp=4), "devices": 8}


def test_eight_devices_give_the_losses_of_one_with_a_quarter_of_the_state_each():
    config = tiny_config("pi0")
    arguments = {"optim": changed(name="muon"), "objective": Gaussian(draws=2)}
    batches = [random_batch(config, 40, seed) for seed in range(5)]
    one, eight = harness(config, **arguments), harness(config, **FSDP, **arguments)
    (_, single), (state, divided) = one.run(one.start(), batches), eight.run(eight.start(), batches)
    for a, b in zip(single, divided, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)

    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held == sharding.bytes_per_device(state, eight.placement)
    assert held < 0.28 * sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "objective",
    [
        Gaussian(draws=2, coupling=OptimalTransport(0.0)),
        Gaussian(draws=2, coupling=Sinkhorn(0.0), dropout=ConditionDropout(both=0.2)),
    ],
    ids=["optimal", "sinkhorn"],
)
def test_couplings_pair_within_the_whole_batch_on_any_number_of_devices(objective):
    config = tiny_config("pi0", cameras=(), head=COMPACT)
    batches = [random_batch(config, 40, seed) for seed in range(3)]
    one, eight = harness(config, objective=objective), harness(config, **FSDP, objective=objective)
    (_, single), (_, divided) = one.run(one.start(), batches), eight.run(eight.start(), batches)
    for a, b in zip(single, divided, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    independent = harness(config, objective=dataclasses.replace(objective, coupling=Independent()))
    assert independent.run(independent.start(), batches)[1][0]["loss"] != single[0]["loss"]


def test_a_shortcut_model_gives_the_losses_of_one_device_on_eight():
    config = tiny_config("pi0", cameras=(), head=COMPACT)
    batches = [random_batch(config, 32, seed) for seed in range(3)]
    one, eight = harness(config, objective=Shortcut()), harness(config, **FSDP, objective=Shortcut())
    (_, single), (_, divided) = one.run(one.start(), batches), eight.run(eight.start(), batches)
    for a, b in zip(single, divided, strict=True):
        # Spans and times go through periods of 0.004, which magnify rounding.
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


def test_devices_exchange_weights_and_not_activations():
    config, size = tiny_config("pi0", cameras=("top",)), 40
    eight = harness(config, **FSDP)
    program = (
        eight.update.lower(np.uint32(0), eight.start(), eight.place(random_batch(config, size))).compile().as_text()
    )
    exchanged = re.findall(r"f32\[([\d,]+)\][^=]* (?:all-gather|all-reduce|reduce-scatter)\(", program)
    shapes = {tuple(map(int, shape.split(","))) for shape in exchanged}
    assert (16, 4, 8) in shapes  # one layer's query weights of the action expert
    assert not [shape for shape in shapes if shape[0] == size and len(shape) > 2]


def test_all_parts_of_the_state_are_divided_alike():
    eight = harness(tiny_config("pi0"), **FSDP, optim=changed(name="muon"))
    specs = {
        jax.tree_util.keystr(path): placement.spec
        for path, placement in jax.tree.leaves_with_path(eight.placement)
        if jax.tree_util.keystr(path).endswith("['action']['attn']['q']")
    }
    assert len(specs) == 3  # weights, momentum, moving average
    assert set(specs.values()) == {jax.P(None, "fsdp", "tensor", None)}


def test_an_axis_that_does_not_divide_stays_whole(caplog):
    caplog.set_level("INFO")
    tree = {"w": nn.LogicallyPartitioned(jnp.zeros((6, 8)), ("embed", "mlp")), "plain": jnp.zeros(3)}
    placed = sharding.shardings(sharding.make_mesh(MeshConfig(data=2, fsdp=4)), tree)
    assert placed["w"].spec == jax.P(None, "tensor")
    assert placed["plain"].spec == jax.P(None)
    assert "embed of 6 stays whole" in caplog.text


@pytest.mark.parametrize("mesh", [MeshConfig(data=3), MeshConfig(data=0), MeshConfig(data=-1, fsdp=-1), MeshConfig(16)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh):
    with pytest.raises(ValueError, match=r"does not fit 8 devices.*--mesh\.data"):
        sharding.make_mesh(mesh)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match="--batch-size 24"):
        sharding.batch_sharding(sharding.make_mesh(MeshConfig()), 30)


def test_the_loss_falls_on_one_batch_and_nothing_compiles_twice():
    tiny = harness(BLIND)
    state, rows = tiny.run(tiny.start(), [random_batch(BLIND, 4)] * 40)
    assert np.mean([r["loss"] for r in rows[-5:]]) < 0.7 * np.mean([r["loss"] for r in rows[:5]])
    assert compat.count_programs(tiny.update) == 1
    assert int(state.step) == 40


def test_the_average_follows_its_formula_from_the_initial_weights():
    tiny = harness(BLIND)
    state = tiny.start()
    expected = jax.tree.map(np.array, state.params)
    for seed in range(3):
        state, _ = tiny.run(state, [random_batch(BLIND, 4, seed)])
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * np.array(p), expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)
    assert state.weights is state.ema


@pytest.mark.parametrize("frozen", [(), ("a/v", "u")])
@pytest.mark.parametrize("ema", ["float32", None])
def test_splitting_a_state_for_a_checkpoint_and_joining_it_gives_it_back(ema, frozen):
    weights = {"w": jnp.arange(3.0), "u": jnp.arange(2.0), "a": {"v": jnp.arange(4.0), "b": jnp.arange(5.0)}}
    before = create(weights, optax.adam(1e-3), ema=ema, frozen=frozen)
    weights, rest = split(before)
    after = join(weights, rest, before)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    assert sum(leaf is before.params["w"] for leaf in jax.tree.leaves((weights, rest))) == 1


def test_each_step_has_randomness_of_its_own_that_does_not_depend_on_the_steps_before():
    tiny, batch = harness(BLIND), random_batch(BLIND, 4)
    losses = []
    for step in (0, 1, 2, 1):
        start = tiny.start()
        _, rows = tiny.run(start._replace(step=jax.device_put(jnp.int32(step), start.step.sharding)), [batch])
        losses.append(rows[0]["loss"])
    assert len(set(losses)) == 3
    assert losses[1] == losses[3]
