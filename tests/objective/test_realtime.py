"""Real-time chunking with a network: guided at inference, and learned in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import Batch
from pi0_jax.config import Cosine, Gaussian, RealTimeConfig, Shortcut
from pi0_jax.flow.loss import flow_loss, loss_mask
from pi0_jax.flow.path import Straight, interpolate
from pi0_jax.flow.realtime import Previous
from pi0_jax.flow.time import Beta
from pi0_jax.model.head.expert import ExpertNetwork
from pi0_jax.objective import gaussian
from pi0_jax.pi0 import loss, make_objective
from pi0_jax.sampler import Euler
from pi0_jax.sampler.ddim import DDIM
from pi0_jax.sampler.dpm_solver import DPMSolver2M
from pi0_jax.sampler.runge_kutta import Heun
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.objective.cases import COMPACT
from tests.objective.setting import Setting

MODEL = {"action_horizon": 6, "action_dim": 5}
BLIND = MODEL | {"cameras": ()}
"""Chunks go on from others by their actions alone, and an image encoder takes half of the time to compile; the setting
of pi0 has one."""


def previous(setting, delay, end) -> Previous:
    return Previous(setting.batch.actions, jnp.asarray(delay), jnp.asarray(end))


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def setting(request):
    model = MODEL if request.param == "pi0" else BLIND
    setting = Setting(Gaussian(max_delay=4), variant=request.param, **model)
    setting.batch = setting.batch._replace(step_mask=jnp.ones((3, 6), bool))
    return setting


def test_without_a_previous_chunk_it_is_the_plain_one_in_one_program(setting):
    plain = setting.sample()
    program = setting.programs[(Euler(2), False, ())]
    before = program._cache_size()
    mixed = setting.sample(previous=previous(setting, [0, 2, 1], [0, 4, 3]))
    np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)
    assert np.abs(mixed - plain)[1:].max(axis=(1, 2)).min() > 1e-2
    alone = setting.sample(previous=previous(setting, [0, 2, 0], [0, 4, 0]))
    np.testing.assert_allclose(alone[1], mixed[1], atol=1e-5)
    assert program._cache_size() == before + 1


def test_the_correction_is_the_transposed_jacobian_of_the_whole_network(setting):
    network, actions = setting.objective.network, setting.batch.actions

    @jax.jit
    def by_hand(noise):
        prefix = network.prefill(setting.params, setting.observation)
        denoised = lambda x: x - network.velocity(setting.params, prefix, x, jnp.ones(3))  # noqa: E731
        error = (actions - denoised(noise)) * (jnp.arange(6) < 3)[None, :, None]
        jacobian = jax.jacfwd(denoised)(noise)
        # One step from t = 1, where the factor is the bound.
        return denoised(noise) + 0.5 * jnp.einsum("BID,BIDCJE->CJE", error, jacobian)

    guided = setting.sample(
        sampler=Euler(1), previous=previous(setting, [1] * 3, [3] * 3),
        real_time=RealTimeConfig(schedule="ones", max_guidance=0.5),
    )  # fmt: skip
    np.testing.assert_allclose(guided, by_hand(setting.noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", [Euler(2), Heun(2, 2.0), DDIM(2), DPMSolver2M(3)], ids=str)
def test_a_trained_network_keeps_the_prefix_and_looks_at_nothing_else(setting, sampler):
    delays, actions = [0, 1, 4], setting.batch.actions

    def sample(previous):
        return setting.sample(sampler=sampler, previous=previous, real_time=RealTimeConfig("trained"))

    chunk = sample(previous(setting, delays, [6, 6, 6]))
    for i, delay in enumerate(delays):
        np.testing.assert_array_equal(chunk[i, :delay], actions[i, :delay])
    np.testing.assert_allclose(chunk[0], setting.sample(sampler=sampler)[0], atol=1e-5)
    prefix = jnp.arange(6)[None] < jnp.array(delays)[:, None]
    other = previous(setting, delays, [4] * 3)._replace(actions=jnp.where(prefix[..., None], actions, 7.0))
    np.testing.assert_array_equal(sample(other), chunk)
    changed = sample(previous(setting, delays, [6] * 3)._replace(actions=actions + 1))
    assert np.abs(changed - chunk)[2, 4:].max() > 1e-3  # what follows depends on what was certain


@functools.cache
def diffuses(predicts: str) -> Setting:
    """Diffusion on the cosine path; its compiled programs serve several tests."""
    return Setting(Gaussian(path=Cosine(), predicts=predicts, max_delay=4), **BLIND)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("method", ["guidance", "identity", "trained"])
@pytest.mark.parametrize("predicts", ["noise", "v"])
def test_diffusion_on_the_cosine_path_may_go_on_from_a_chunk_too(predicts, method, power):
    diffusion = diffuses(predicts)
    before = previous(diffusion, [0, 2, 4], [0, 4, 6])
    sampler = DDIM(4, power)
    for options in ({}, {"guidance_scale": 1.5}):
        plain = diffusion.sample(sampler=sampler, **options)
        chunk = diffusion.sample(sampler=sampler, previous=before, real_time=RealTimeConfig(method), **options)
        assert np.isfinite(chunk).all()
        np.testing.assert_allclose(chunk[0], plain[0], rtol=1e-3, atol=2e-3)
        assert np.abs(chunk - plain)[1:].max(axis=(1, 2)).min() > 1e-3
        if method == "trained":
            np.testing.assert_array_equal(chunk[2, :4], diffusion.batch.actions[2, :4])


class Recorder(ExpertNetwork):
    """A network whose outputs are its parameters, and which keeps what it was asked."""

    def joint(self, params, observation, x, time, span=None):
        jax.debug.callback(lambda x, time: seen.append((np.array(x), np.array(time))), x, time)
        return params


seen: list = []


def test_in_training_a_prefix_is_clean_and_only_the_others_count():
    model = tiny_config()
    network, rng = Recorder(model), np.random.default_rng(0)
    actions = jnp.asarray(rng.normal(size=(64, 6, 5)), jnp.float32)
    observation = random_batch(model, 64).observation
    mask = jnp.arange(6)[None] < jnp.asarray(rng.integers(3, 7, 64))[:, None]
    batch = Batch(jax.tree.map(jnp.asarray, observation), actions, mask, jnp.ones((64, 5), bool))

    @functools.partial(jax.grad, argnums=0)
    def gradient(outputs, config):
        objective = gaussian.make(config, network)
        return loss(objective, outputs, batch, jax.random.key(0))[0]

    outputs = jnp.asarray(rng.normal(size=(64, 2, 6, 5)), jnp.float32)
    for masked in (True, False):
        config = Gaussian(max_delay=4, draws=2, mask_padded_steps=masked)
        moved = np.abs(gradient(outputs, config)) > 0
        x, time = seen[-1]
        prefix = time == 0
        np.testing.assert_array_equal(moved.all(-1), ~prefix & (np.asarray(mask)[:, None] | (not masked)))
        np.testing.assert_array_equal(moved.any(-1), moved.all(-1))
        np.testing.assert_array_equal(x[prefix], np.broadcast_to(actions[:, None], x.shape)[prefix])
        assert (np.diff(prefix.astype(int)) <= 0).all()
        assert np.abs(x - np.asarray(actions)[:, None])[~prefix].min() > 0
        shares = np.bincount(prefix.sum(-1).ravel(), minlength=5) / 128
        np.testing.assert_allclose(shares, 0.2, atol=0.1)
        for times, clean in zip(time.reshape(-1, 6), prefix.reshape(-1, 6), strict=True):
            assert len(set(times[~clean])) == 1


def test_draws_without_delay_give_the_plain_loss(setting):
    """Of the keys, one for which all delays come out 0; the plain network draws the same noise and times."""
    objectives = [make_objective(Gaussian(max_delay=delay), setting.model) for delay in (0, 1)]
    run = [jax.jit(lambda params, batch, key, o=o: loss(o, params, batch, key)[0]) for o in objectives]
    keys = [jax.random.key(i) for i in range(64)]
    zero = [key for key in keys if not jax.random.randint(jax.random.fold_in(key, 5), (3, 1), 0, 2).any()]
    values = [[float(value(setting.params, setting.batch, key)) for value in run] for key in (zero[0], keys[0])]
    assert values[0][0] == pytest.approx(values[0][1], rel=1e-5)
    assert zero[0] is not keys[0]
    assert values[1][0] != pytest.approx(values[1][1], rel=1e-3)


def test_without_delays_the_loss_is_the_plain_formula_bit_for_bit(setting):
    objective = make_objective(Gaussian(), setting.model)

    @jax.jit
    def formula(params, batch, key):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (3, 1, 6, 5))
        time = Beta().sample(time_key, (3, 1))
        x, target = interpolate(Straight(), jnp.broadcast_to(batch.actions[:, None], noise.shape), noise, time)
        predicted = objective.network.joint(params, batch.observation, x, time)
        return flow_loss(predicted, target, loss_mask(noise.shape, batch.step_mask[:, None]))

    key = jax.random.key(3)
    value = jax.jit(lambda params, batch, key: loss(objective, params, batch, key)[0])
    assert float(value(setting.params, setting.batch, key)) == float(formula(setting.params, setting.batch, key))


@pytest.mark.parametrize("config", [Gaussian(), Shortcut()], ids=["gaussian", "shortcut"])
def test_the_compact_head_can_be_guided(config):
    setting = Setting(config, head=COMPACT, **BLIND)
    before = previous(setting, [1] * 3, [4] * 3)
    for method in ("guidance", "identity"):
        guided = setting.sample(previous=before, real_time=RealTimeConfig(method))
        assert np.abs(guided - setting.sample()).max() > 1e-3
    with pytest.raises(ValueError, match=r"fine-tune it with --policy.objective.max-delay"):
        setting.sample(previous=before, real_time=RealTimeConfig("trained"))
