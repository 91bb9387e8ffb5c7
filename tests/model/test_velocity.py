import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.config import PI0, PI05
from pi0_jax.model.velocity import VelocityNetwork, embed_time, may_attend
from pi0_jax.pi0 import init_params
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

VARIANTS = ("pi0", "pi05")


class Tiny:
    """A tiny network with random parameters (those that start at zero too), and random inputs."""

    def __init__(self, variant: str, batch: int = 2, **changes):
        self.config = tiny_config(variant, **changes)
        self.network = VelocityNetwork(self.config)
        c, rng = self.config, np.random.default_rng(2)
        self.params = random_params(self.network, rng)
        self.observation = random_observation(c, batch, rng)
        self.x = jnp.asarray(rng.normal(size=(batch, c.action_horizon, c.action_dim)), jnp.float32)
        self.time = jnp.linspace(0.1, 0.9, batch)

    def __call__(self, observation=None, x=None, time=None, params=None):
        observation = self.observation if observation is None else observation
        x = self.x if x is None else x
        time = self.time if time is None else time
        return self._jitted({"params": self.params if params is None else params}, observation, x, time)

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.network.apply)

    def cached(self, x=None, time=None):
        """The same velocity by way of `prefill`."""

        def run(params, x, time):
            prefix = self.network.apply({"params": params}, self.observation, method="prefill")
            return self.network.apply({"params": params}, prefix, x, time, method="velocity")

        return jax.jit(run)(self.params, self.x if x is None else x, self.time if time is None else time)


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request):
    return Tiny(request.param)


@pytest.mark.parametrize(("config", "parameters"), [(PI0, 3_238_048_528), (PI05, 3_353_433_872)])
def test_released_sizes_have_the_released_number_of_parameters(config, parameters):
    shapes = jax.eval_shape(functools.partial(init_params, VelocityNetwork(config)), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(shapes))) == parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_float32_and_names_its_axes(variant):
    shapes = jax.eval_shape(
        functools.partial(init_params, VelocityNetwork(tiny_config(variant, dtype="bfloat16"))), jax.random.key(0)
    )
    for leaf in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert leaf.value.dtype == jnp.float32


def test_prefill_and_cached_velocity_agree_with_the_joint_pass(tiny):
    np.testing.assert_allclose(tiny.cached(), tiny(), atol=2e-5, rtol=2e-5)


def test_a_time_for_each_action_may_be_one_time_for_all(tiny):
    per_action = jnp.repeat(tiny.time[:, None], tiny.config.action_horizon, axis=1)
    np.testing.assert_allclose(tiny(time=per_action), tiny(), atol=1e-5)
    mixed = per_action.at[:, 0].set(0.0)
    np.testing.assert_allclose(tiny.cached(time=mixed), tiny(time=mixed), atol=2e-5, rtol=2e-5)
    assert np.abs(tiny(time=mixed) - tiny()).max() > 1e-3


def test_draws_that_share_an_observation_equal_separate_passes(tiny):
    x = jnp.stack([tiny.x, tiny.x + 1.0, -tiny.x], axis=1)
    time = jnp.stack([tiny.time, 1 - tiny.time, tiny.time**2], axis=1)
    together = tiny(x=x, time=time)
    for i in range(3):
        np.testing.assert_allclose(together[:, i], tiny(x=x[:, i], time=time[:, i]), atol=1e-5)


def test_padded_prompt_tokens_have_exactly_no_effect(tiny):
    other = jnp.where(tiny.observation.prompt_mask, tiny.observation.prompt, 5)
    np.testing.assert_array_equal(tiny(tiny.observation._replace(prompt=other)), tiny())
    assert (
        np.abs(tiny(tiny.observation._replace(prompt=tiny.observation.prompt.at[:, 0].add(1) % 64)) - tiny()).max() > 0
    )


def test_a_camera_left_out_of_the_config_equals_that_camera_masked(tiny):
    masks = {"top": jnp.ones(2, bool), "tool": jnp.zeros(2, bool)}
    masked = tiny(tiny.observation._replace(image_masks=masks))
    without = VelocityNetwork(dataclasses.replace(tiny.config, cameras=("top",)))
    result = jax.jit(without.apply)({"params": tiny.params}, tiny.observation, tiny.x, tiny.time)
    np.testing.assert_allclose(result, masked, atol=1e-5)
    assert np.abs(masked - tiny()).max() > 1e-3


def test_cameras_enter_in_the_order_of_the_config_not_of_the_dict(tiny):
    images = dict(reversed(tiny.observation.images.items()))
    np.testing.assert_array_equal(tiny(tiny.observation._replace(images=images)), tiny())


@pytest.mark.parametrize("cameras", [(), ("a",), ("a", "b", "c", "d", "e", "f")])
def test_any_number_of_cameras(cameras):
    tiny = Tiny("pi0", cameras=cameras)
    assert tiny().shape == tiny.x.shape


def test_a_missing_camera_is_named(tiny):
    images = {"top": tiny.observation.images["top"], "wrist": tiny.observation.images["tool"]}
    with pytest.raises(ValueError, match=r"lacks cameras \['tool'\]; it has \['top', 'wrist'\]"):
        tiny(tiny.observation._replace(images=images))


def test_state_reaches_pi0_and_not_pi05():
    for variant, reaches in (("pi0", True), ("pi05", False)):
        tiny = Tiny(variant)
        changed = tiny(tiny.observation._replace(state=tiny.observation.state + 1.0))
        assert bool(np.abs(changed - tiny()).max() > 1e-4) == reaches


def test_the_prefix_never_sees_the_actions(tiny):
    def prefix_after(x):
        def run(network, x):
            actions, condition = network.embed_actions(x, tiny.time)
            prefix, prefix_mask = network.embed_prefix(tiny.observation)
            s, t = prefix.shape[1], actions.shape[1]
            blocks = np.repeat([0, 2], [s, t])
            mask = jnp.concatenate([prefix_mask, jnp.ones((2, t), bool)], axis=1)
            _, (keys, values) = network.backbone(
                (prefix, actions), jnp.cumsum(mask, axis=1), may_attend(blocks, blocks) & mask[:, None], condition
            )
            return keys[:, :, :s], values[:, :, :s]

        return tiny.network.apply({"params": tiny.params}, x, method=run)

    gradient = jax.jit(jax.grad(lambda x: sum(jnp.sum(jnp.square(y)) for y in prefix_after(x))))(tiny.x)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("needed", [(False, True), (True, False), (False, False)])
def test_what_is_not_needed_is_not_computed_and_changes_nothing(tiny, needed):
    def run(network, needed):
        actions, condition = network.embed_actions(tiny.x, tiny.time)
        prefix, prefix_mask = network.embed_prefix(tiny.observation)
        blocks = np.repeat([0, 2], [prefix.shape[1], actions.shape[1]])
        mask = jnp.concatenate([prefix_mask, jnp.ones((2, actions.shape[1]), bool)], axis=1)
        allowed = may_attend(blocks, blocks) & mask[:, None]
        return network.backbone((prefix, actions), jnp.cumsum(mask, axis=1), allowed, condition, needed=needed)

    apply = functools.partial(tiny.network.apply, {"params": tiny.params}, method=run)
    outputs, keys_values = jax.jit(apply, static_argnums=0)((True, True))
    fewer, same = jax.jit(apply, static_argnums=0)(needed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), same, keys_values)
    for output, other, asked in zip(outputs, fewer, needed, strict=True):
        assert (other is not None) == asked
        if asked:
            np.testing.assert_allclose(other, output, atol=1e-5, rtol=1e-5)


def test_blocks_see_themselves_and_what_is_before_but_not_other_draws():
    blocks = np.array([0, 0, 1, 2, 2, 3])
    expected = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    np.testing.assert_array_equal(may_attend(blocks, blocks), np.array(expected, bool))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_close_and_returns_float32(variant):
    exact, rounded = Tiny(variant), Tiny(variant, dtype="bfloat16")
    result = rounded()
    assert result.dtype == jnp.float32
    assert float(jnp.linalg.norm(result - exact()) / jnp.linalg.norm(exact())) < 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_rematerialisation_changes_no_gradient(variant):
    gradients = []
    for remat in ("none", "matmuls", "gate_up", "full"):
        tiny = Tiny(variant, remat=remat)
        gradients.append(jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(tiny(params=p)))))(tiny.params))
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients[0], other)


def test_time_embedding_has_the_stated_periods():
    embedded = embed_time(jnp.array([0.0, 4e-3, 4.0]), 16)
    np.testing.assert_allclose(embedded[0], [0.0] * 8 + [1.0] * 8, atol=1e-6)
    np.testing.assert_allclose(embedded[1, [0, 8]], [0.0, 1.0], atol=1e-5)  # shortest period completed
    np.testing.assert_allclose(embedded[2, [7, 15]], [0.0, 1.0], atol=1e-5)  # longest period completed
