import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.config import Compact
from pi0_jax.model.head import make_head
from pi0_jax.model.head.compact import pool
from pi0_jax.objective.conditioning import without
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

POOLINGS = ("last", "mean", "attention")


class Tiny:
    """A tiny compact network with random parameters and inputs."""

    def __init__(self, variant: str = "pi0", **compact):
        head = Compact(**{"width": 16, "depth": 2, "time_width": 8} | compact)
        self.config = tiny_config(variant, head=head, cameras=("top",))
        self.network, rng = make_head(self.config), np.random.default_rng(0)
        self.params = random_params(self.network, rng)
        self.observation = random_observation(self.config, 2, rng)
        self.x = jnp.asarray(rng.normal(size=(2, self.config.action_horizon, self.config.action_dim)), jnp.float32)
        self.time = jnp.array([0.1, 0.9])
        self._apply = jax.jit(self.network.joint)

    def __call__(self, observation=None, x=None, time=None):
        observation = self.observation if observation is None else observation
        x, time = self.x if x is None else x, self.time if time is None else time
        return self._apply(self.params, observation, x, time)


@pytest.fixture(scope="module", params=["concat", "adaln"])
def tiny(request):
    return Tiny(conditioning=request.param)


def test_draws_that_share_an_observation_equal_separate_passes(tiny):
    x = jnp.stack([tiny.x, tiny.x + 1.0, -tiny.x], axis=1)
    time = jnp.stack([tiny.time, 1 - tiny.time, tiny.time**2], axis=1)
    together = tiny(x=x, time=time)
    assert together.shape == x.shape
    for i in range(3):
        np.testing.assert_allclose(together[:, i], tiny(x=x[:, i], time=time[:, i]), atol=1e-5)


def test_observation_chunk_and_time_all_reach_the_velocity(tiny):
    observation = tiny.observation
    image = {"top": -observation.images["top"]}
    for changed in (
        tiny(observation._replace(images=image)),
        tiny(observation._replace(state=observation.state + 1)),
        tiny(observation._replace(prompt=observation.prompt.at[:, 0].add(1) % 64)),
        tiny(x=tiny.x + 1),
        tiny(time=tiny.time / 2),
    ):
        assert np.abs(changed - tiny()).max() > 1e-4


def test_the_velocity_of_one_step_needs_one_vector_of_the_observation(tiny):
    def run(params):
        pooled = tiny.network.prefill(params, tiny.observation)
        return pooled, tiny.network.velocity(params, pooled, tiny.x, tiny.time)

    pooled, velocity = jax.jit(run)(tiny.params)
    assert pooled.shape == (2, tiny.config.language.width)
    np.testing.assert_allclose(velocity, tiny(), atol=1e-6)


def test_modulation_that_starts_at_zero_leaves_time_and_observation_out_at_first():
    tiny = Tiny(conditioning="adaln")
    tiny.params |= {name: jax.tree.map(jnp.zeros_like, tiny.params[name]) for name in ("modulation_0", "modulation_1")}
    np.testing.assert_array_equal(tiny(time=tiny.time / 2), tiny())
    assert np.abs(tiny(x=tiny.x + 1) - tiny()).max() > 1e-3


def test_pooling_looks_at_valid_tokens_only():
    tokens = jax.random.normal(jax.random.key(0), (3, 5, 24))
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    query = jax.random.normal(jax.random.key(1), (24,))
    rows = np.asarray(tokens)
    np.testing.assert_allclose(pool(tokens, mask, "last"), [rows[0, 4], rows[1, 2], rows[2, 3]], atol=1e-6)
    mean = [rows[0].mean(0), rows[1, [0, 2]].mean(0), rows[2, 3]]
    np.testing.assert_allclose(pool(tokens, mask, "mean"), mean, atol=1e-6)
    np.testing.assert_allclose(pool(tokens, mask, "attention", jnp.zeros(24)), mean, atol=1e-6)
    looked = pool(tokens, mask, "attention", 100 * query)
    best = np.where(np.asarray(mask), rows @ np.asarray(query), -np.inf).argmax(1)
    np.testing.assert_allclose(looked, rows[np.arange(3), best], atol=1e-2)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_where_nothing_is_valid_the_vector_is_zero_and_gradients_are_finite(pooling):
    tokens, mask = jax.random.normal(jax.random.key(0), (2, 3, 24)), jnp.array([[1, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(pool(tokens, mask, pooling, jnp.ones(24))[1], 0)
    gradient = jax.grad(lambda x, query: jnp.sum(jnp.square(pool(x, mask, pooling, query))), (0, 1))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradient(tokens, jnp.ones(24)))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_tokens_have_exactly_no_effect_on_pi05_either(pooling):
    tiny = Tiny("pi05", pooling=pooling)
    other = jnp.where(tiny.observation.prompt_mask, tiny.observation.prompt, 5)
    np.testing.assert_array_equal(tiny(tiny.observation._replace(prompt=other)), tiny())
    np.testing.assert_array_equal(tiny(tiny.observation._replace(state=tiny.observation.state + 1)), tiny())
    nothing = tiny(without(tiny.observation, "both"))
    assert bool(jnp.isfinite(nothing).all())


def test_no_action_expert_is_made():
    names = set(jax.eval_shape(lambda: nn.meta.unbox(Tiny().network.init(jax.random.key(0))))["backbone"])
    assert names == {"layers", "language_norm"}
