"""Real-time chunking with a network: guided at inference, and learned in training."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import Batch
from pi0_jax.config import FlowConfig, PolicyConfig, RealTimeConfig
from pi0_jax.flow.guidance import Previous
from pi0_jax.flow.loss import flow_loss
from pi0_jax.flow.path import interpolate
from pi0_jax.flow.time import sample_time
from pi0_jax.model.heads import make_network
from pi0_jax.pi0 import check_policy, loss, sample_actions
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params


class Setting:
    """A tiny network with random parameters, a batch of three, and previous chunks."""

    def __init__(self, variant: str, **changes):
        config = tiny_config(variant, cameras=("top",), **changes)
        rng, shape = np.random.default_rng(1), (3, config.action_horizon, config.action_dim)
        self.network = make_network(config)
        self.params = random_params(self.network, rng)
        self.observation = random_observation(config, 3, rng)
        self.noise, self.actions = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
        self.batch = Batch(
            self.observation, self.actions, jnp.ones(shape[:2], bool), jnp.ones((3, config.action_dim), bool)
        )
        self._sample = jax.jit(
            functools.partial(sample_actions, self.network), static_argnames=("num_steps", "real_time")
        )

    def __call__(self, previous=None, num_steps=2, **real_time):
        return self._sample(
            self.params, self.observation, self.noise, num_steps=num_steps, previous=previous,
            real_time=RealTimeConfig(**real_time),
        )  # fmt: skip

    def previous(self, delay, end) -> Previous:
        return Previous(self.actions, jnp.asarray(delay), jnp.asarray(end))


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def setting(request):
    return Setting(request.param, max_delay=4)


def test_a_chunk_without_a_previous_one_is_the_plain_one_and_delays_share_a_program(setting):
    plain = setting()
    before = setting._sample._cache_size()
    mixed = setting(setting.previous([0, 2, 1], [0, 4, 3]))
    np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)
    assert np.abs(mixed - plain)[1:].max(axis=(1, 2)).min() > 1e-2
    alone = setting(setting.previous([0, 2, 0], [0, 4, 0]))
    np.testing.assert_allclose(alone[1], mixed[1], atol=1e-5)
    assert setting._sample._cache_size() == before + 1


def test_the_correction_is_the_transposed_jacobian_of_the_whole_network(setting):
    apply = functools.partial(setting.network.apply, {"params": setting.params})

    @jax.jit
    def by_hand(noise):
        landing = lambda x: x - apply(setting.observation, x, jnp.ones(3))  # noqa: E731
        error = (setting.actions - landing(noise)) * (jnp.arange(6) < 3)[:, None]
        jacobian = jax.jacfwd(landing)(noise)
        # One step from t = 1, where the factor is the bound.
        return landing(noise) + 0.5 * jnp.einsum("BID,BIDCJE->CJE", error, jacobian)

    guided = setting(setting.previous([1] * 3, [3] * 3), num_steps=1, schedule="ones", max_guidance=0.5)
    np.testing.assert_allclose(guided, by_hand(setting.noise), rtol=1e-4, atol=1e-4)


def test_a_trained_network_keeps_the_prefix_exactly_and_looks_at_nothing_else_of_the_previous_chunk(setting):
    delays = [0, 1, 4]
    sample = setting(setting.previous(delays, [6, 6, 6]), method="trained")
    for i, delay in enumerate(delays):
        np.testing.assert_array_equal(sample[i, :delay], setting.actions[i, :delay])
    np.testing.assert_allclose(sample[0], setting()[0], atol=1e-5)
    prefix = jnp.arange(6) < jnp.array(delays)[:, None]
    other = setting.previous(delays, [4] * 3)._replace(actions=jnp.where(prefix[..., None], setting.actions, 7.0))
    np.testing.assert_array_equal(setting(other, method="trained"), sample)
    changed = setting(setting.previous(delays, [6] * 3)._replace(actions=setting.actions + 1), method="trained")
    assert np.abs(changed - sample)[2, 4:].max() > 1e-3  # what follows depends on what was certain


def told(params, _, x, time):
    """In a network's place: its outputs are its parameters, and what it was told is left in `seen`."""
    jax.debug.callback(lambda x, time: seen.append((x, time)), x, time)
    return jnp.broadcast_to(params["params"], x.shape)


seen: list = []


def test_in_training_a_prefix_is_clean_and_only_the_rest_counts():
    config = tiny_config(max_delay=4)
    network = types.SimpleNamespace(config=config, apply=told)
    rng = np.random.default_rng(0)
    actions = jnp.asarray(rng.normal(size=(64, 6, 5)), jnp.float32)
    observation = random_observation(config, 64, rng)
    mask = jnp.arange(6) < jnp.asarray(rng.integers(3, 7, 64))[:, None]
    batch = Batch(observation, actions, mask, jnp.ones((64, 5), bool))
    seen.clear()

    @functools.partial(jax.grad, argnums=0)
    def gradient(outputs, flow):
        return loss(network, outputs, batch, jax.random.key(0), flow)[0]  # pyright: ignore[reportArgumentType]

    outputs = jnp.asarray(rng.normal(size=(64, 2, 6, 5)), jnp.float32)
    for masked in (True, False):
        moved = np.abs(gradient(outputs, FlowConfig(samples_per_observation=2, mask_padded_steps=masked))) > 0
        x, time = (np.asarray(value) for value in seen[-1])
        prefix = time == 0
        np.testing.assert_array_equal(moved.all(-1), ~prefix & (np.asarray(mask)[:, None] | (not masked)))
        np.testing.assert_array_equal(moved.any(-1), moved.all(-1))
        np.testing.assert_array_equal(x[prefix], np.broadcast_to(actions[:, None], x.shape)[prefix])
        assert (np.diff(prefix.astype(int)) <= 0).all()
        assert np.abs(x - np.asarray(actions)[:, None])[~prefix].min() > 0
        shares = np.bincount(prefix.sum(-1).ravel(), minlength=5) / 128
        np.testing.assert_allclose(shares, 0.2, atol=0.1)
        for times, given in zip(time.reshape(-1, 6), prefix.reshape(-1, 6), strict=True):
            assert len(set(times[~given])) == 1


def test_draws_without_delay_give_the_plain_loss(setting):
    """Of the keys, one for which all delays come out 0; the plain network draws the same noise and times."""
    plain = make_network(dataclasses.replace(setting.network.config, max_delay=0))
    short = make_network(dataclasses.replace(setting.network.config, max_delay=1))
    run = {n: jax.jit(functools.partial(loss, n, flow=FlowConfig())) for n in (plain, short)}
    keys = [jax.random.key(i) for i in range(64)]
    zero = [key for key in keys if not jax.random.randint(jax.random.fold_in(key, 5), (3, 1), 0, 2).any()]
    values = [[float(run[n](setting.params, setting.batch, key)[0]) for n in run] for key in (zero[0], keys[0])]
    assert values[0][0] == pytest.approx(values[0][1], rel=1e-5)
    assert zero[0] is not keys[0]
    assert values[1][0] != pytest.approx(values[1][1], rel=1e-3)


def test_without_delays_the_loss_is_the_plain_formula_bit_for_bit(setting):
    network = make_network(dataclasses.replace(setting.network.config, max_delay=0))

    @jax.jit
    def formula(params, batch, key):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (3, 1, 6, 5))
        time = sample_time(time_key, (3, 1))
        x, target = interpolate(jnp.broadcast_to(batch.actions[:, None], noise.shape), noise, time)
        predicted = network.apply({"params": params}, batch.observation, x, time)
        return flow_loss(predicted, target, batch.step_mask[:, None])

    key = jax.random.key(3)
    value, _ = jax.jit(functools.partial(loss, network, flow=FlowConfig()))(setting.params, setting.batch, key)
    assert float(value) == float(formula(setting.params, setting.batch, key))


@pytest.mark.parametrize(
    ("model", "real_time", "message"),
    [
        ({"max_delay": 6}, {}, "max_delay is 6; of a chunk of 6 actions at most 5"),
        ({"max_delay": 2, "head": "compact"}, {}, "has the head 'compact' and predicts velocity"),
        ({"max_delay": 2, "prediction": "average_velocity"}, {}, "predicts average_velocity"),
        ({}, {"method": "trained"}, "fine-tune it with --policy.model.max-delay"),
        ({}, {"method": "guided"}, "unknown real_time.method 'guided'"),
        ({"prediction": "average_velocity"}, {"method": "identity"}, "steers a velocity"),
    ],
)
def test_what_cannot_continue_a_chunk_is_refused(model, real_time, message):
    with pytest.raises(ValueError, match=message):
        check_policy(PolicyConfig(model=tiny_config(**model), real_time=RealTimeConfig(**real_time)))


def test_the_compact_head_can_be_guided():
    setting = Setting("pi0", head="compact")
    assert np.abs(setting(setting.previous([1] * 3, [4] * 3)) - setting()).max() > 1e-3
