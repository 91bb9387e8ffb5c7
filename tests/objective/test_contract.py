"""What every objective promises to training and to validation, whatever it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.config import (
    Autoregressive,
    Compact,
    ConditionDropout,
    Cosine,
    ExpertConfig,
    Fast,
    Gaussian,
    Independent,
    Joint,
    ModelConfig,
    OptimalTransport,
    Reflow,
    Shortcut,
    Sinkhorn,
    Tokens,
    Uniform,
)
from pi0_jax.objective import for_validation
from pi0_jax.pi0 import SampleOptions, loss, make_objective, sample_actions
from pi0_jax.sampler import Euler, Greedy
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.objective.cases import CASES, COMPACT, weights

ALL = CASES | {
    "data": ({"head": COMPACT}, Gaussian(path=Cosine(), predicts="data")),
    "velocity_cosine": ({"head": COMPACT}, Gaussian(path=Cosine(), draws=2)),
    "warmup": ({"head": COMPACT}, Gaussian(regression_warmup_steps=3)),
    "reflow": ({"head": COMPACT}, Reflow(teacher="run", teacher_steps=2, draws=2)),
    "joint": (
        {"variant": "pi05"},
        Joint(codec=Fast(skip=4, max_tokens=8), text_tokens=4, flow=Gaussian(draws=2, coupling=Sinkhorn(0.02))),
    ),
    "joint_text": ({}, Joint(codec=None, text_tokens=6, insulate=False, reduction="token")),
    "autoregressive": ({"variant": "pi0_fast"}, Autoregressive(codec=Fast(skip=4, max_tokens=12))),
    "autoregressive_by_token": (
        {"variant": "pi0_fast", "language": ExpertConfig(24, 48, lora_attn_rank=2)},
        Autoregressive(codec=Fast(skip=4, max_tokens=12), reduction="token"),
    ),
}
NUM_MICROBATCHES = 2
SEEING = ("gaussian", "uniform_dropout", "stem_sincos", "compact", "reflow", "joint", "autoregressive")
"""Of the others, which handle images as these do, networks have no image encoder: it takes a third of the time."""


def model_of(name: str) -> ModelConfig:
    return tiny_config(**ALL[name][0] | ({} if name in SEEING else {"cameras": ()}))


def microbatches(draws):
    """Every second example, and the others, along a new first axis."""
    return jax.tree.map(lambda x: x.reshape(-1, NUM_MICROBATCHES, *x.shape[1:]).swapaxes(0, 1), draws)


@pytest.mark.parametrize("name", ALL)
def test_losses_of_microbatches_add_up_and_nothing_recompiles(name):
    model, config = model_of(name), ALL[name][1]
    objective = make_objective(config, model)
    params = weights(objective)
    teacher = () if objective.teacher is None else (jax.tree.map(lambda x: x / 2, params),)
    sizes: list[set[int]] = []

    @jax.jit
    def losses(params, batch, key, step, *teacher):
        draws, count = objective.draw(batch, key, step)
        sizes.append({leaf.shape[0] for leaf in jax.tree.leaves(draws)})
        whole, metrics = objective.loss(params, draws, count, *teacher)
        pieces = jax.lax.map(lambda some: objective.loss(params, some, count, *teacher)[0], microbatches(draws))
        return whole, pieces, metrics

    values = []
    for seed in (0, 1):
        batch = random_batch(model, 8, seed, config.target_length)
        whole, pieces, metrics = losses(params, batch, jax.random.key(seed), seed, *teacher)
        assert whole.shape == ()
        assert isinstance(metrics, dict)
        np.testing.assert_allclose(pieces.sum(), whole, rtol=1e-5)
        assert (np.asarray(pieces) > 0).all()
        values.append(float(whole))
    assert np.isfinite(values).all()
    assert values[0] != values[1]
    assert losses._cache_size() == len(sizes) == 1
    # The first axes count examples: those of the batch, or of a fraction of it, which divides alike.
    assert 8 in sizes[0]
    assert all(size % NUM_MICROBATCHES == 0 and size <= 8 for size in sizes[0])


@pytest.mark.parametrize("name", ["gaussian", "compact", "bin_sequence"])
def test_no_tracer_outlives_the_trace_of_a_gradient_or_of_a_sampler(name):
    model, config = ALL[name]
    model = tiny_config(**model)
    objective = make_objective(config, model)
    params = weights(objective)
    teacher = () if objective.teacher is None else (params,)
    batch = random_batch(model, 4, 0, config.target_length)
    sampler = Greedy() if config.decodes else Euler(2)

    def update(params, batch, key):
        return jax.grad(loss, 1, has_aux=True)(objective, params, batch, key, 1, *teacher)

    def sample(params, observation, noise):
        return sample_actions(objective, params, observation, noise, SampleOptions(sampler))

    with jax.checking_leaks():
        gradient, _ = jax.eval_shape(update, params, batch, jax.random.key(0))
        actions = jax.eval_shape(sample, params, batch.observation, batch.actions)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
    assert actions.shape == batch.actions.shape


@pytest.mark.parametrize("name", ALL)
def test_draws_are_decided_by_key_and_step_alone(name):
    model, config = ALL[name]
    model = tiny_config(**model)
    draw = jax.jit(make_objective(config, model).draw)
    batch = random_batch(model, 8, 0, config.target_length)
    first = draw(batch, jax.random.key(0), 5)
    jax.tree.map(np.testing.assert_array_equal, first, draw(batch, jax.random.key(0), 5))
    other = draw(batch, jax.random.key(1), 5)
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), first, other)))


@pytest.mark.parametrize("name", ALL)
def test_validation_drops_nothing_and_counts_only_steps_inside_episodes(name):
    _, config = ALL[name]
    config = dataclasses.replace(config, dropout=ConditionDropout(0.1, 0.1, 0.1), mask_padded_steps=False)
    held_out = for_validation(config)
    assert held_out.mask_padded_steps
    assert held_out.dropout == ConditionDropout()
    assert getattr(held_out, "coupling", Independent()) == Independent()
    assert for_validation(held_out) == held_out
    if isinstance(config, Joint):
        assert held_out.flow == for_validation(config.flow)
    elif not isinstance(config, Reflow):
        kept = {"dropout": held_out.dropout, "mask_padded_steps": True}
        kept |= {"coupling": Independent(), "regression_warmup_steps": 0} if isinstance(config, Gaussian) else {}
        assert held_out == dataclasses.replace(config, **kept)


def test_validation_of_reflow_is_that_of_the_flow_it_learns():
    config = Reflow(teacher="run", time=Uniform(), draws=3, mask_padded_dims=True)
    assert for_validation(config) == Gaussian(time=Uniform(), draws=3, mask_padded_dims=True)


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (Gaussian(dropout=ConditionDropout(prompt=1.5)), {}, r"objective.dropout.prompt is 1.5"),
        (Shortcut(dropout=ConditionDropout(images=-0.1)), {}, r"objective.dropout.images is -0.1"),
        (Tokens(dropout=ConditionDropout(0.5, 0.4, 0.3)), {}, "their sum is above 1"),
        (Gaussian(regression_warmup_steps=2, predicts="noise"), {}, "has nothing to regress on"),
        (Gaussian(regression_draw=True, predicts="noise"), {}, "has nothing to regress on"),
        (Gaussian(max_delay=6), {}, "max_delay is 6; of a chunk of 6 actions at most 5"),
        (Gaussian(max_delay=2), {"head": Compact()}, "Compact has one time per chunk"),
        (Shortcut(bootstrap_fraction=0.0), {}, r"bootstrap_fraction is 0.0"),
        (Shortcut(bootstrap_fraction=1.0), {}, r"bootstrap_fraction is 1.0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, model, message):
    with pytest.raises(ValueError, match=message):
        make_objective(config, tiny_config(**model))


def test_a_coupling_and_draws_go_together():
    make_objective(Gaussian(coupling=OptimalTransport(), draws=2, regression_draw=True), tiny_config())
