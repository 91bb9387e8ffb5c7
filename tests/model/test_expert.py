import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.config import PI0, PI05, ExpertConfig
from pi0_jax.model import gemma
from pi0_jax.model.gemma import Segment
from pi0_jax.model.head import make_head
from pi0_jax.model.head.expert import embed_time
from pi0_jax.plan import hlo
from pi0_jax.plan.hlo_collectives import traffic
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

VARIANTS = ("pi0", "pi05")


class Tiny:
    """A tiny network with random parameters (those that start at zero too), and random inputs."""

    def __init__(self, variant: str, batch: int = 2, **changes):
        self.config = tiny_config(variant, **changes)
        self.network = make_head(self.config)
        c, rng = self.config, np.random.default_rng(2)
        self.params = random_params(self.network, rng)
        self.observation = random_observation(c, batch, rng)
        self.x = jnp.asarray(rng.normal(size=(batch, c.action_horizon, c.action_dim)), jnp.float32)
        self.time = jnp.linspace(0.1, 0.9, batch)

    def __call__(self, observation=None, x=None, time=None, params=None):
        observation = self.observation if observation is None else observation
        x = self.x if x is None else x
        time = self.time if time is None else time
        return self._jitted(self.params if params is None else params, observation, x, time)

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.network.joint)

    def cached(self, x=None, time=None):
        """The same velocity by way of `prefill`."""

        def run(params, x, time):
            return self.network.velocity(params, self.network.prefill(params, self.observation), x, time)

        return jax.jit(run)(self.params, self.x if x is None else x, self.time if time is None else time)


@functools.cache
def tiny_of(variant: str) -> Tiny:
    return Tiny(variant)


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request):
    return tiny_of(request.param)


@pytest.mark.parametrize(("config", "parameters"), [(PI0, 3_238_048_528), (PI05, 3_353_433_872)])
def test_released_sizes_have_the_released_number_of_parameters(config, parameters):
    shapes = jax.eval_shape(make_head(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(shapes))) == parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_float32_and_names_its_axes(variant):
    shapes = jax.eval_shape(make_head(tiny_config(variant, dtype="bfloat16")).init, jax.random.key(0))
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
    without = make_head(dataclasses.replace(tiny.config, cameras=("top",)))
    result = jax.jit(without.joint)(tiny.params, tiny.observation, tiny.x, tiny.time)
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
        tiny = tiny_of(variant)
        changed = tiny(tiny.observation._replace(state=tiny.observation.state + 1.0))
        assert bool(np.abs(changed - tiny()).max() > 1e-4) == reaches


def test_image_tokens_follow_one_another_by_camera():
    tiny = tiny_of("pi0")
    embed = jax.jit(lambda observation: tiny.network.embed_prefix(tiny.params, observation))
    images, there = tiny.observation.images, tiny.observation.image_masks
    changed = {"images": images | {"tool": images["tool"].at[1].add(0.5)}}
    changed["image_masks"] = there | {"tool": jnp.array([True, False])}
    (tokens, valid), (others, left) = embed(tiny.observation), embed(tiny.observation._replace(**changed))
    differ = np.zeros(valid.shape, bool)
    differ[1, 4:8] = True  # four patches each, "top" and then "tool"
    np.testing.assert_array_equal(np.any(tokens != others, axis=-1), differ)
    np.testing.assert_array_equal(valid & ~left, differ)


def test_images_of_a_divided_batch_stay_on_their_devices():
    tiny = tiny_of("pi0")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    observation = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P("x"))), tiny.observation
    )
    text = jax.jit(lambda o: tiny.network.embed_prefix(tiny.params, o)).lower(observation).compile().as_text()
    assert sum(traffic(hlo.parse(text)).values()) == 0


def segments(tiny, params, x, **changes):
    """Prefix and actions of a joint pass."""
    network, width = tiny.network, tiny.config.action.width
    tokens, valid = network.embed_prefix(params, tiny.observation)
    actions = jnp.tile(x, (1, 1, -(-width // x.shape[-1])))[..., :width]
    condition = jnp.ones((len(x), 1, width)) if tiny.config.variant == "pi05" else None
    begins = np.arange(x.shape[1]) == 0
    return [
        Segment("language", tokens, np.zeros(tokens.shape[1], int), valid=valid),
        Segment("action", actions, begins.astype(int), condition=condition, **changes),
    ]


def test_the_prefix_never_sees_the_actions(tiny):
    def prefix_after(x):
        both = segments(tiny, tiny.params, x)
        _, (keys, values) = gemma.forward(tiny.config, tiny.params["backbone"], both)
        length = both[0].tokens.shape[1]
        return keys[:, :, :length], values[:, :, :length]

    gradient = jax.jit(jax.grad(lambda x: sum(jnp.sum(jnp.square(y)) for y in prefix_after(x))))(tiny.x)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("insulated", [True, False])
def test_a_segment_that_reads_without_gradient_gives_the_prefix_none(tiny, insulated):
    def loss(params):
        both = segments(tiny, params, tiny.x, reads_with_gradient=not insulated)
        outputs, _ = gemma.forward(tiny.config, params["backbone"], both)
        return jnp.sum(jnp.square(outputs[1]))

    value, gradient = jax.jit(jax.value_and_grad(loss))(tiny.params)
    prefix = [gradient["image_encoder"], gradient["embedding"], gradient["backbone"]["layers"]["language"]]
    reached = [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(prefix)]
    assert any(reached) != insulated
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient["backbone"]["layers"]["action"]))
    # What the segment computes is the same.
    outputs, _ = gemma.forward(tiny.config, tiny.params["backbone"], segments(tiny, tiny.params, tiny.x))
    np.testing.assert_allclose(value, jnp.sum(jnp.square(outputs[1])), rtol=1e-5)


@pytest.mark.parametrize("needed", [(False, True), (True, False), (False, False)])
def test_unneeded_outputs_are_not_computed_and_change_nothing(tiny, needed):
    def run(needed):
        both = [s._replace(needed=n) for s, n in zip(segments(tiny, tiny.params, tiny.x), needed, strict=True)]
        return gemma.forward(tiny.config, tiny.params["backbone"], both)

    outputs, keys_values = jax.jit(run, static_argnums=0)((True, True))
    fewer, same = jax.jit(run, static_argnums=0)(needed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), same, keys_values)
    for output, other, asked in zip(outputs, fewer, needed, strict=True):
        assert (other is not None) == asked
        if asked:
            np.testing.assert_allclose(other, output, atol=1e-5, rtol=1e-5)


def test_the_output_of_one_token_per_row_is_that_of_all(tiny):
    def run(needed):
        segment, _ = segments(tiny, tiny.params, tiny.x)
        return gemma.forward(tiny.config, tiny.params["backbone"], [segment._replace(needed=needed)])

    place = jnp.arange(len(tiny.x)) + 2
    (output,), keys_values = jax.jit(lambda: run(True))()
    (one,), same = jax.jit(lambda: run(place))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), same, keys_values)
    np.testing.assert_allclose(one[:, 0], output[np.arange(len(place)), place], atol=1e-5, rtol=1e-5)


def test_as_a_linen_module_it_gives_the_same_and_sows_the_residual_streams(tiny):
    module, variables = tiny.network.module(), {"params": tiny.params}
    inputs = (tiny.observation, tiny.x, tiny.time)
    result, state = module.apply(variables, *inputs, capture_intermediates=True, mutable=["intermediates"])
    np.testing.assert_allclose(result, tiny(), atol=1e-5)
    streams = {name: value[0] for name, value in flatten_dict(state["intermediates"], sep="/").items()}
    depth, (b, horizon, _) = tiny.config.depth, tiny.x.shape
    images = streams["image_encoder/layers"]
    assert images.shape == (tiny.config.vision.depth, 2 * b, 4, tiny.config.vision.width)
    # The last language layer gives keys and values alone.
    assert streams["backbone/layers/language"].shape[0] == depth - 1
    actions = streams["backbone/layers/action"]
    assert actions.shape == (depth - 1, b, horizon + (tiny.config.variant == "pi0"), tiny.config.action.width)
    assert all(bool(jnp.isfinite(x).all()) for x in streams.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_close_and_returns_float32(variant):
    exact, rounded = tiny_of(variant), Tiny(variant, dtype="bfloat16")
    result = rounded()
    assert result.dtype == jnp.float32
    assert float(jnp.linalg.norm(result - exact()) / jnp.linalg.norm(exact())) < 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_rematerialisation_changes_no_gradient(variant):
    cameras = ("top", "tool") if variant == "pi0" else ()  # both have the same image encoder
    gradients = []
    for remat in ("none", "matmuls", "gate_up", "full"):
        tiny = Tiny(variant, remat=remat, cameras=cameras)
        gradients.append(jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(tiny(params=p)))))(tiny.params))
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients[0], other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unrolled_layers_have_the_loss_and_gradients_of_scanned_ones(variant):
    tiny = Tiny(variant, remat="full", depth=3, language=ExpertConfig(width=24, mlp_dim=48, lora_mlp_rank=2))

    def loss(params, prepare):
        return jnp.sum(jnp.square(tiny(params=prepare(params))))

    scanned, unrolled = (
        jax.jit(jax.value_and_grad(functools.partial(loss, prepare=prepare)))(tiny.params)
        for prepare in (lambda params: params, tiny.network.unrolled)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), unrolled, scanned)
    program = str(jax.make_jaxpr(lambda p: tiny(params=tiny.network.unrolled(p)))(tiny.params))
    assert "prevent_cse=True" in program, "or XLA would merge rematerialisation away"


def test_time_embedding_has_the_stated_periods():
    embedded = embed_time(jnp.array([0.0, 4e-3, 4.0]), 16)
    np.testing.assert_allclose(embedded[0], [0.0] * 8 + [1.0] * 8, atol=1e-6)
    np.testing.assert_allclose(embedded[1, [0, 8]], [0.0, 1.0], atol=1e-5)  # shortest period completed
    np.testing.assert_allclose(embedded[2, [7, 15]], [0.0, 1.0], atol=1e-5)  # longest period completed
