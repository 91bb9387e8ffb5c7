import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import Batch
from pi0_jax.config import BinConfig, FlowConfig, PolicyConfig
from pi0_jax.flow.straightness import straightness
from pi0_jax.model.heads import make_network
from pi0_jax.model.velocity import VelocityNetwork
from pi0_jax.pi0 import (
    check_policy,
    condition_features,
    coupled_noise,
    drop_conditions,
    example_inputs,
    flow_straightness,
    init_params,
    loss,
    sample_actions,
    scale_images,
    without,
)
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params


@pytest.fixture(scope="module")
def setting():
    """A tiny network, its parameters, and a batch."""
    config = tiny_config()
    network = VelocityNetwork(config)
    params = jax.jit(lambda key: nn.meta.unbox(init_params(network, key)))(jax.random.key(0))
    observation, x, _ = example_inputs(config, 3)
    actions = jax.random.normal(jax.random.key(1), x.shape)
    step_mask = jnp.arange(config.action_horizon) < jnp.array([[6], [2], [4]])
    dim_mask = jnp.tile(jnp.arange(config.action_dim) < 3, (3, 1))
    return network, params, Batch(observation, actions, step_mask, dim_mask)


def value(setting, key: int, flow: FlowConfig, **changes) -> float:
    network, params, batch = setting
    run = jax.jit(functools.partial(loss, network, flow=flow))
    return float(run(params, batch._replace(**changes), jax.random.key(key))[0])


def test_the_loss_depends_on_the_draws_and_counts_what_the_masks_say(setting):
    flow = FlowConfig(samples_per_observation=2, mask_padded_dims=True)
    batch = setting[2]
    assert value(setting, 0, flow) != value(setting, 1, flow)
    unmasked = dataclasses.replace(flow, mask_padded_steps=False, mask_padded_dims=False)
    assert value(setting, 0, unmasked) != value(setting, 0, flow)
    assert value(setting, 0, flow, step_mask=jnp.zeros_like(batch.step_mask)) == 0


def test_the_mean_draw_needs_no_randomness(setting):
    flow = FlowConfig(samples_per_observation=1, mean_draw=True)
    assert value(setting, 0, flow) == value(setting, 1, flow)
    more = dataclasses.replace(flow, samples_per_observation=3)
    assert value(setting, 0, more) != value(setting, 1, more)


def test_the_mean_draw_is_the_error_of_the_predicted_mean(setting):
    network, params, batch = setting
    zeros = jnp.zeros_like(batch.actions)
    apply = jax.jit(network.apply)
    predicted = apply({"params": params}, scale_images(batch.observation), zeros, jnp.ones(3))
    error = jnp.square(predicted + batch.actions)[batch.step_mask]
    flow = FlowConfig(samples_per_observation=1, mean_draw=True)
    assert value(setting, 0, flow) == pytest.approx(float(error.mean()), rel=1e-4)


def test_uint8_images_are_scaled_and_float_images_kept(setting):
    observation = setting[2].observation
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    scaled = scale_images(observation._replace(images={"top": pixels, "tool": observation.images["tool"]}))
    np.testing.assert_allclose(scaled.images["top"].ravel(), [-1, -0.6, 1], atol=1e-6)
    np.testing.assert_array_equal(scaled.images["tool"], observation.images["tool"])


class Sampler:
    """A tiny network with random parameters, a batch, and its compiled programs."""

    def __init__(self, **changes):
        config = tiny_config(
            **{"cameras": ("top",), "action_horizon": 3, "action_dim": 4, "prompt_length": 5} | changes
        )
        self.network, rng = make_network(config), np.random.default_rng(1)
        self.params = random_params(self.network, rng)
        self.observation = random_observation(config, 3, rng)
        self.noise = jnp.asarray(rng.normal(size=(3, 3, 4)), jnp.float32)
        actions = jnp.asarray(rng.uniform(-1, 1, (3, 3, 4)), jnp.float32)
        self.batch = Batch(self.observation, actions, jnp.ones((3, 3), bool), jnp.ones((3, 4), bool))
        static = ("num_steps", "solver", "grid_power", "guidance_without", "path")
        self._sample = jax.jit(functools.partial(sample_actions, self.network), static_argnames=static)
        self._unguided = jax.jit(
            functools.partial(sample_actions, self.network, guidance_scale=1.0), static_argnames=static
        )

    def __call__(self, observation=None, noise=None, scale=None, **options):
        observation = self.observation if observation is None else observation
        noise = self.noise if noise is None else noise
        options = {"num_steps": 2} | options
        if scale is None:
            return self._unguided(self.params, observation, noise, **options)
        return self._sample(self.params, observation, noise, guidance_scale=scale, **options)

    def loss(self, key: int = 0, teacher=None, **flow):
        run = functools.partial(loss, self.network, flow=FlowConfig(**flow))
        return float(jax.jit(run)(self.params, self.batch, jax.random.key(key), teacher=teacher)[0])


@pytest.fixture(scope="module", params=["expert", "compact"])
def sampler(request):
    return Sampler(head=request.param)


def test_guidance_of_scale_0_is_the_network_that_is_not_told_and_of_scale_1_the_network_itself(sampler):
    untold = sampler(without(sampler.observation, "prompt"))
    np.testing.assert_allclose(sampler(scale=0.0), untold, atol=1e-5)
    # The velocity is that of the told half exactly, but a batch twice as large is summed in another order.
    np.testing.assert_allclose(sampler(scale=1.0), sampler(), atol=1e-5)
    assert np.abs(untold - sampler()).max() > 1e-3
    assert np.abs(sampler(scale=3.0) - sampler()).max() > 1e-3
    assert sampler._sample._cache_size() == 1


def test_guidance_may_leave_out_images_or_both(sampler):
    for what in ("images", "both"):
        untold = sampler(without(sampler.observation, what))
        np.testing.assert_allclose(sampler(scale=0.0, guidance_without=what), untold, atol=1e-5)


def test_one_who_is_not_told_the_prompt_or_the_images_cannot_know_them(sampler):
    observation = sampler.observation
    other = observation._replace(prompt=observation.prompt + 1, images={"top": -observation.images["top"]})
    np.testing.assert_array_equal(sampler(without(observation, "both")), sampler(without(other, "both")))
    for what in ("prompt", "images"):
        alone = observation._replace(**{"prompt": other.prompt} if what == "prompt" else {"images": other.images})
        np.testing.assert_array_equal(sampler(without(observation, what)), sampler(without(alone, what)))
        assert np.abs(sampler(observation) - sampler(alone)).max() > 1e-4


def test_conditions_are_dropped_as_often_as_said_and_never_two_kinds_at_once():
    observation, _, _ = example_inputs(
        tiny_config(vision=dataclasses.replace(tiny_config().vision, image_size=8)), 4000
    )
    flow = FlowConfig(drop_prompt=0.1, drop_images=0.2, drop_both=0.3)
    dropped = jax.jit(functools.partial(drop_conditions, flow=flow))(
        observation, jax.random.uniform(jax.random.key(0), (4000,))
    )
    prompt = ~np.asarray(dropped.prompt_mask)
    images = ~np.stack(list(dropped.image_masks.values()), axis=1)
    for mask in (prompt, images):
        np.testing.assert_array_equal(mask.all(1), mask.any(1))
    prompt, images = prompt[:, 0], images[:, 0]
    shares = [np.mean(prompt & ~images), np.mean(images & ~prompt), np.mean(prompt & images)]
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3], atol=0.03)
    np.testing.assert_array_equal(dropped.prompt, observation.prompt)


def test_dropping_always_makes_the_loss_blind_to_the_prompt():
    blind = Sampler(head="compact")
    before = blind.loss(drop_prompt=1.0)
    blind.batch = blind.batch._replace(observation=blind.observation._replace(prompt=blind.observation.prompt + 1))
    assert blind.loss(drop_prompt=1.0) == before
    assert blind.loss() != before


def test_a_grid_of_power_1_is_the_uniform_one_and_another_is_not(sampler):
    other = sampler(num_steps=3, grid_power=2.0)
    assert np.abs(other - sampler(num_steps=3)).max() > 1e-4
    end, points = sampler(num_steps=3, grid_power=2.0, path=True)
    np.testing.assert_allclose(end, other, atol=1e-6)
    assert points.shape == (4, 3, 3, 4)


def test_straightness_is_that_of_euler_steps_from_fresh_noise(sampler):
    run = jax.jit(functools.partial(flow_straightness, sampler.network, num_steps=4))
    noise = jax.random.normal(jax.random.key(5), sampler.noise.shape)
    _, points = sampler(noise=noise, num_steps=4, path=True)
    measured = float(run(sampler.params, sampler.batch, jax.random.key(5)))
    assert measured == pytest.approx(float(straightness(points)), rel=1e-4)
    assert measured > 0


def test_in_reflow_the_teachers_chunk_of_the_noise_takes_the_place_of_the_actions():
    flow = Sampler(head="compact")
    teacher = jax.tree.map(lambda x: 0.5 * x, flow.params)
    settings = dict(samples_per_observation=2, reflow_steps=3, time="uniform")
    expected = flow.loss(teacher=teacher, **settings)
    flow.batch = flow.batch._replace(actions=flow.batch.actions + 7)
    assert flow.loss(teacher=teacher, **settings) == expected

    @jax.jit
    def by_hand(params, teacher):
        noise_key, time_key = jax.random.split(jax.random.key(0))
        noise = jax.random.normal(noise_key, (3, 2, 3, 4))[:, :1]
        made = sample_actions(flow.network, teacher, flow.observation, noise[:, 0], num_steps=3)[:, None]
        time = jax.random.uniform(time_key, (3, 2))
        x = time[..., None, None] * noise + (1 - time[..., None, None]) * made
        predicted = flow.network.apply({"params": params}, flow.observation, x, time)
        return jnp.mean(jnp.square(predicted - (noise - made)))

    assert expected == pytest.approx(float(by_hand(flow.params, teacher)), rel=1e-4)


@pytest.mark.parametrize("coupling", ["optimal", "sinkhorn"])
def test_a_coupling_reorders_each_draws_noise_by_itself_and_a_changed_prompt_costs(coupling):
    config = tiny_config()
    rng = np.random.default_rng(0)
    observation = random_observation(config, 4, rng)
    # Two pairs of equal observations.
    observation = jax.tree.map(lambda x: x[jnp.array([0, 0, 1, 1])], observation)
    noise = jnp.asarray(rng.normal(size=(4, 2, 1, 1)), jnp.float32)
    actions = jnp.asarray(rng.normal(size=(4, 1, 1)), jnp.float32)
    flow = FlowConfig(coupling=coupling, condition_weight=1e4)
    paired = np.asarray(
        jax.jit(functools.partial(coupled_noise, flow=flow))(noise, actions, observation, jax.random.key(0))
    )
    for draw in range(2):
        for pair in (slice(0, 2), slice(2, 4)):
            assert set(paired[pair, draw].ravel()) <= set(np.asarray(noise)[pair, draw].ravel())
            if coupling == "optimal":
                np.testing.assert_array_equal(
                    np.argsort(paired[pair, draw].ravel()), np.argsort(np.asarray(actions)[pair].ravel())
                )


def test_features_tell_observations_apart_and_not_what_is_masked():
    observation = random_observation(tiny_config(), 1, np.random.default_rng(0))
    features = jax.jit(condition_features)
    here = features(observation)

    def distance(**changes):
        return float(jnp.sum(jnp.square(features(observation._replace(**changes)) - here)))

    assert distance() == 0
    assert distance(prompt=observation.prompt.at[0, 0].set(63)) >= 1
    assert distance(prompt=observation.prompt.at[0, -1].set(63)) == 0  # padding
    assert distance(state=observation.state + 1) >= 1
    assert distance(images={name: image + 1 for name, image in observation.images.items()}) >= 1
    masks = {name: jnp.zeros(1, bool) for name in observation.images}
    assert distance(image_masks=masks) == pytest.approx(
        float(jnp.sum(jnp.square(here)) - jnp.sum(jnp.square(features(observation._replace(image_masks=masks))))),
        rel=1e-4,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_diffusion_is_deterministic_without_keys_and_each_chunk_has_its_own_key(prediction):
    diffusion = Sampler(head="compact", prediction=prediction)
    keys = jax.random.split(jax.random.key(0), 3)
    steps = dict(num_steps=3)
    ddim, ddpm = diffusion(solver="ddim", **steps), diffusion(solver="ddpm", keys=keys, **steps)
    np.testing.assert_array_equal(diffusion(solver="ddim", keys=keys, **steps), ddim)
    assert np.abs(ddpm - ddim).max() > 1e-3
    other = diffusion(solver="ddpm", keys=keys.at[0].set(jax.random.key(9)), **steps)
    np.testing.assert_allclose(other[1:], ddpm[1:], atol=1e-5)
    with pytest.raises(ValueError, match="give `keys`, one a chunk"):
        sample_actions(diffusion.network, diffusion.params, diffusion.observation, diffusion.noise, solver="ddpm")


@pytest.mark.parametrize("prediction", ["bins", "bin_sequence"])
def test_bins_ignore_noise_and_solver_and_leave_padding_0(prediction):
    binned = Sampler(prediction=prediction, bins=BinConfig(8, 3))
    actions = binned()
    np.testing.assert_array_equal(binned(noise=binned.noise + 1), actions)
    np.testing.assert_array_equal(actions[..., 3:], 0)
    assert set(np.unique(np.round(actions[..., :3] * 8))) <= set(range(-7, 8, 2))
    end, points = binned(path=True)
    np.testing.assert_array_equal(points[-1], end)


def test_a_shortcut_model_is_told_the_length_of_its_steps():
    shortcut = Sampler(head="compact", prediction="average_velocity")
    apply = jax.jit(shortcut.network.apply)
    for num_steps, span in ((1, 1.0), (2, 0.5), (3, 0.0)):
        x = shortcut.noise
        for i in range(num_steps):
            time = jnp.full(3, 1 - i / num_steps)
            average = apply({"params": shortcut.params}, shortcut.observation, x, time, jnp.full(3, span))
            x = x - average / num_steps
        # Times near 1/3 go through periods of 0.004, which magnify their rounding.
        np.testing.assert_allclose(shortcut(num_steps=num_steps), x, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "eular"}, "unknown solver 'eular'.*Did you mean 'euler'"),
        ({"solver": "ddim"}, "predicts velocity is sampled by euler or midpoint or heun or rk4, not ddim"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"grid_power": 0.0}, "have to be positive"),
        ({"prediction": "v"}, "predicts v is sampled by ddim or ddpm, not euler"),
        ({"prediction": "epsilon", "solver": "ddim", "grid_power": 2.0}, "sampled in equal steps"),
        ({"prediction": "average_velocity", "solver": "heun"}, "sampled by euler, not heun"),
        ({"prediction": "average_velocity", "grid_power": 2.0}, "sampled in equal steps"),
        ({"prediction": "bins"}, "quantile normalisation; it is 'zscore'"),
        ({"prediction": "bins", "normalization": "quantile", "guidance_scale": 2.0}, "guidance steers a flow"),
    ],
)
def test_policies_whose_settings_do_not_go_together_are_refused(changes, message):
    model = dataclasses.replace(tiny_config(), prediction=changes.pop("prediction", "velocity"))
    with pytest.raises(ValueError, match=message):
        check_policy(PolicyConfig(model=model, **changes))


def test_settings_that_go_together_are_accepted():
    for prediction, changes in {
        "velocity": {"solver": "rk4", "grid_power": 2.0, "guidance_scale": 3.0},
        "average_velocity": {"guidance_scale": 3.0},
        "epsilon": {"solver": "ddpm"},
        "v": {"solver": "ddim"},
        "bins": {"normalization": "quantile"},
    }.items():
        check_policy(PolicyConfig(model=tiny_config(prediction=prediction), **changes))
