"""Loss and sampling through the one page, on tiny networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import example_observation, scale_images
from pi0_jax.config import (
    ConditionDropout,
    Cosine,
    Gaussian,
    Guidance,
    PolicyConfig,
    RealTimeConfig,
    Reflow,
    Shortcut,
    Tokens,
    Uniform,
)
from pi0_jax.flow.realtime import Previous
from pi0_jax.flow.straightness import straightness
from pi0_jax.objective.conditioning import without
from pi0_jax.pi0 import SampleOptions, init_params, make_objective, sample_actions, sample_path, sampling_options
from pi0_jax.sampler import SAMPLERS, Euler, Greedy
from pi0_jax.sampler.ddim import DDIM
from pi0_jax.sampler.runge_kutta import RK4, Heun
from tests.conftest import tiny_config
from tests.objective.setting import HEADS, Setting
from tests.sampler.solvers import SOLVERS

COMPACT = HEADS["compact"]
BLIND = {"head": COMPACT, "cameras": ()}
"""Without the image encoder, which takes half of the time to compile a sampler."""


@pytest.fixture(scope="module")
def setting():
    """A tiny flow, and a batch with padding."""
    setting = Setting(Gaussian(), head=COMPACT, action_horizon=6)
    setting.batch = setting.batch._replace(
        step_mask=jnp.arange(6)[None] < jnp.array([[6], [2], [4]]), dim_mask=jnp.tile(jnp.arange(4) < 3, (3, 1))
    )
    return setting


@pytest.fixture(scope="module", params=HEADS)
def flow(request):
    return Setting(Gaussian(), head=HEADS[request.param])


def test_parameters_are_float32_and_depend_on_the_key(setting):
    init = jax.jit(lambda key: init_params(setting.objective, key))
    first, second = init(jax.random.key(0)), init(jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype("float32")}
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), first, second)))


def test_the_loss_depends_on_the_draws_and_counts_what_the_masks_say(setting):
    masked = {"draws": 2, "mask_padded_dims": True}
    assert setting.loss(0, **masked) != setting.loss(1, **masked)
    assert setting.loss(0, draws=2, mask_padded_steps=False) != setting.loss(0, **masked)
    before, setting.batch = setting.batch, setting.batch._replace(step_mask=jnp.zeros((3, 6), bool))
    assert setting.loss(0, **masked) == 0
    setting.batch = before


def test_the_regression_draw_needs_no_randomness(setting):
    assert setting.loss(0, regression_draw=True) == setting.loss(1, regression_draw=True)
    assert setting.loss(0, regression_draw=True, draws=3) != setting.loss(1, regression_draw=True, draws=3)


def predicted_mean(setting) -> float:
    """Error of the mean that the network predicts without any noise."""
    batch, zeros = setting.batch, jnp.zeros_like(setting.batch.actions)[:, None]
    joint = jax.jit(setting.objective.network.joint)
    predicted = joint(setting.params, scale_images(batch.observation), zeros, jnp.ones((3, 1)))[:, 0]
    return float(jnp.square(predicted + batch.actions)[batch.step_mask].mean())


def test_the_regression_draw_is_the_error_of_the_predicted_mean(setting):
    assert setting.loss(0, regression_draw=True) == pytest.approx(predicted_mean(setting), rel=1e-4)


def test_warm_up_trains_on_regression_alone_in_the_same_program(setting):
    objective = make_objective(Gaussian(regression_warmup_steps=3, draws=2), setting.model)

    @jax.jit
    def loss(params, key, step):
        return objective.loss(params, *objective.draw(setting.batch, key, step))[0]

    values = [[float(loss(setting.params, jax.random.key(key), step)) for key in (0, 1)] for step in (0, 2, 3)]
    assert values[0][0] == values[0][1] == values[1][0] == pytest.approx(predicted_mean(setting), rel=1e-4)
    assert len({*values[2], values[0][0]}) == 3
    assert loss._cache_size() == 1
    assert values[2][0] == pytest.approx(setting.loss(0, draws=2), rel=1e-6)


def test_uint8_images_are_scaled_and_float_images_kept():
    observation = example_observation(tiny_config(), 1)
    pixels = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    scaled = scale_images(observation._replace(images={"top": pixels, "tool": observation.images["tool"]}))
    np.testing.assert_allclose(scaled.images["top"].ravel(), [-1, -0.6, 1], atol=1e-6)
    np.testing.assert_array_equal(scaled.images["tool"], observation.images["tool"])


def test_guidance_of_scale_0_ignores_the_prompt_and_1_changes_nothing(flow):
    unconditional = flow.sample(observation=without(flow.observation, "prompt"))
    np.testing.assert_allclose(flow.sample(guidance_scale=0.0), unconditional, atol=1e-5)
    # The velocity is that of the conditional half exactly, but a batch twice as large is summed in another order.
    np.testing.assert_allclose(flow.sample(guidance_scale=1.0), flow.sample(), atol=1e-5)
    assert np.abs(unconditional - flow.sample()).max() > 1e-3
    assert np.abs(flow.sample(guidance_scale=3.0) - flow.sample()).max() > 1e-3
    assert flow.programs[(Euler(2), False, ())]._cache_size() == 2  # with a scale and without


def test_guidance_may_leave_out_images_or_both(flow):
    for condition in ("images", "both"):
        unconditional = flow.sample(observation=without(flow.observation, condition))
        guided = flow.sample(guidance_scale=0.0, guidance_without=condition)
        np.testing.assert_allclose(guided, unconditional, atol=1e-5)


def test_what_is_dropped_cannot_be_known(flow):
    observation = flow.observation
    other = observation._replace(prompt=observation.prompt + 1, images={"top": -observation.images["top"]})

    def sample(observation):
        return flow.sample(observation=observation)

    np.testing.assert_array_equal(sample(without(observation, "both")), sample(without(other, "both")))
    for condition in ("prompt", "images"):
        alone = observation._replace(**{condition: getattr(other, condition)})
        np.testing.assert_array_equal(sample(without(observation, condition)), sample(without(alone, condition)))
        assert np.abs(sample(observation) - sample(alone)).max() > 1e-4


def test_dropping_always_makes_the_loss_blind_to_the_prompt():
    blind = Setting(Gaussian(), **BLIND)
    always = {"dropout": ConditionDropout(prompt=1.0)}
    before = blind.loss(**always)
    blind.batch = blind.batch._replace(observation=blind.observation._replace(prompt=blind.observation.prompt + 1))
    assert blind.loss(**always) == before
    assert blind.loss() != before


def test_the_path_ends_at_the_actions_of_its_own_grid(flow):
    warped = Euler(3, grid_power=2.0)
    actions = flow.sample(sampler=warped)
    assert np.abs(actions - flow.sample(sampler=Euler(3))).max() > 1e-4
    points = flow.sample(sampler=warped, path=True)
    np.testing.assert_allclose(points[-1], actions, atol=1e-6)
    np.testing.assert_array_equal(points[0], flow.noise)
    assert points.shape == (4, 3, 3, 4)


def test_a_path_takes_a_solver(setting):
    with pytest.raises(ValueError, match="Greedy, which decodes tokens"):
        setting.sample(sampler=Greedy(), path=True)


def test_the_straightness_of_a_sampled_path_is_measured(flow):
    assert float(straightness(flow.sample(sampler=Euler(4), path=True))) > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_samples_the_network_and_more_steps_change_less(solver):
    setting = Setting(Gaussian(), **BLIND)
    ends = [setting.sample(sampler=SOLVERS[solver](n)) for n in (2, 32, 64)]
    assert np.isfinite(ends).all()
    assert np.abs(ends[2] - ends[1]).max() < np.abs(ends[2] - ends[0]).max()


def test_features_of_the_samplers_times_change_nothing(flow):
    for sampler in (Euler(3), Heun(2, 2.0)):
        features = flow.objective.features(flow.params, sampler)
        if features is not None:
            assert {leaf.shape[0] for leaf in jax.tree.leaves(features)} == {sampler.num_steps}
        np.testing.assert_allclose(flow.sample(sampler=sampler, features=features), flow.sample(sampler=sampler),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
        guided = flow.sample(sampler=sampler, guidance_scale=2.0)
        np.testing.assert_allclose(flow.sample(sampler=sampler, guidance_scale=2.0, features=features), guided,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


def test_in_reflow_the_teachers_chunk_takes_the_place_of_the_actions():
    reflow = Setting(Reflow(teacher="run", draws=2, teacher_steps=3, time=Uniform()), **BLIND)
    reflow.batch = reflow.batch._replace(step_mask=jnp.ones((3, 3), bool))
    teacher = jax.tree.map(lambda x: 0.5 * x, reflow.params)
    expected = reflow.loss(teacher=(teacher,))
    reflow.batch = reflow.batch._replace(actions=reflow.batch.actions + 7)
    assert reflow.loss(teacher=(teacher,)) == expected
    plain = make_objective(Gaussian(), reflow.model)

    @jax.jit
    def by_hand(params, teacher):
        noise_key, time_key = jax.random.split(jax.random.key(0))
        noise = jax.random.normal(noise_key, (3, 2, 3, 4))[:, :1]
        made = sample_actions(plain, teacher, reflow.observation, noise[:, 0], SampleOptions(Euler(3)))[:, None]
        time = jax.random.uniform(time_key, (3, 2))
        x = time[..., None, None] * noise + (1 - time[..., None, None]) * made
        predicted = plain.network.joint(params, reflow.observation, x, time)
        return jnp.mean(jnp.square(predicted - (noise - made)))

    assert expected == pytest.approx(float(by_hand(reflow.params, teacher)), rel=1e-4)
    assert reflow.objective.teacher == "run"


@pytest.mark.parametrize("predicts", ["noise", "v"])
def test_diffusion_is_random_with_eta_alone_and_each_chunk_has_its_own_key(predicts):
    diffusion = Setting(Gaussian(path=Cosine(), predicts=predicts), **BLIND)
    keys = jax.random.split(jax.random.key(0), 3)
    ddim, ddpm = (diffusion.sample(sampler=DDIM(3, eta=eta), keys=keys) for eta in (0.0, 1.0))
    np.testing.assert_array_equal(diffusion.sample(sampler=DDIM(3)), ddim)
    assert np.abs(ddpm - ddim).max() > 1e-3
    other = diffusion.sample(sampler=DDIM(3, eta=1.0), keys=keys.at[0].set(jax.random.key(9)))
    np.testing.assert_allclose(other[1:], ddpm[1:], atol=1e-5)
    with pytest.raises(ValueError, match="give `keys`, one per chunk"):
        diffusion.sample(sampler=DDIM(3, eta=1.0))


@pytest.mark.parametrize("order", ["parallel", "autoregressive"])
def test_tokens_ignore_noise_and_leave_padding_0(order):
    tokens = Setting(Tokens(bins=8, dims=3, order=order))
    actions = tokens.sample(sampler=Greedy())
    np.testing.assert_array_equal(tokens.sample(sampler=Greedy(), noise=tokens.noise + 1), actions)
    np.testing.assert_array_equal(actions[..., 3:], 0)
    assert set(np.unique(np.round(actions[..., :3] * 8))) <= set(range(-7, 8, 2))
    assert tokens.objective.flow is None
    with pytest.raises(ValueError, match="no path from noise to actions"):
        sample_path(tokens.objective, tokens.params, tokens.observation, tokens.noise, SampleOptions(Greedy()))


def test_a_shortcut_model_is_given_the_length_of_its_steps():
    shortcut = Setting(Shortcut(), **BLIND)
    joint = jax.jit(shortcut.objective.network.joint)
    for num_steps, span in ((1, 1.0), (2, 0.5), (3, 0.0)):
        x = shortcut.noise
        for i in range(num_steps):
            time, spans = jnp.full((3, 1), 1 - i / num_steps), jnp.full((3, 1), span)
            x = x - joint(shortcut.params, shortcut.observation, x[:, None], time, spans)[:, 0] / num_steps
        # Times near 1/3 go through periods of 0.004, which magnify their rounding.
        np.testing.assert_allclose(shortcut.sample(sampler=Euler(num_steps)), x, atol=2e-3)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (Gaussian(), {"sampler": Greedy()}, "Greedy, which decodes tokens; this network predicts chunks"),
        (Gaussian(), {"sampler": Euler(0)}, "at least 1 step"),
        (Gaussian(), {"sampler": Euler(3, grid_power=0.0)}, "a positive power"),
        (Gaussian(), {"real_time": RealTimeConfig("trained"), "previous": ()}, "not trained to go on"),
        (Shortcut(), {"sampler": Heun()}, r"sampled in equal steps of Euler's; policy.sampler is Heun"),
        (Shortcut(), {"sampler": Euler(grid_power=2.0)}, "sampled in equal steps of Euler's"),
        (Tokens(), {"sampler": Euler()}, r"decoded by Greedy; policy.sampler is Euler"),
        (Tokens(), {"sampler": Greedy(), "guidance_scale": 2.0}, "guidance and real-time chunking steer a flow"),
        (Tokens(), {"sampler": Greedy(), "previous": ()}, "guidance and real-time chunking steer a flow"),
    ],
)
def test_sampling_that_does_not_suit_what_was_learned_is_refused(config, options, message):
    objective = make_objective(config, tiny_config())
    if "previous" in options:
        previous = Previous(jnp.zeros((1, 6, 5)), jnp.ones(1, int), jnp.ones(1, int))
        options = {**options, "previous": previous}

    def sample(key):
        observation = example_observation(tiny_config(), 1)
        params = init_params(objective, key)
        return sample_actions(objective, params, observation, jnp.zeros((1, 6, 5)), SampleOptions(**options))

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sample, jax.random.key(0))


def test_a_policys_sampling_options_are_its_configuration():
    policy = PolicyConfig(robot="tabletop", sampler=RK4(3, 2.0), guidance=Guidance(3.0, "images"))
    options = sampling_options(policy)
    assert (options.sampler, options.guidance_scale, options.guidance_without) == (RK4(3, 2.0), 3.0, "images")
    real_time = RealTimeConfig("identity", "linear", 10.0)
    options = sampling_options(PolicyConfig(robot="tabletop", sampler=Greedy(), real_time=real_time))
    assert (options.sampler, options.guidance_scale, options.real_time) == (Greedy(), None, real_time)
    assert set(SAMPLERS) == {"Greedy", "Categorical", *SOLVERS}
