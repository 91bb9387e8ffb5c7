"""Every head with every objective learns, with all of its parameters; and one network may stand in for another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax.batch import Batch
from pi0_jax.config import Compact, Cosine, Expert, Gaussian, Shortcut, Tokens, Uniform
from pi0_jax.model.head import Network, TokenNetwork, make_head, make_tokens
from pi0_jax.objective import make_objective
from pi0_jax.pi0 import loss
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

HEADS = {"expert": Expert(), "compact": Compact(width=32, depth=2, time_width=16)}
OBJECTIVES = {
    "velocity": Gaussian(time=Uniform()),
    "shortcut": Shortcut(time=Uniform()),
    "noise": Gaussian(path=Cosine(), predicts="noise", time=Uniform()),
    "v": Gaussian(path=Cosine(), predicts="v", time=Uniform()),
    "parallel": Tokens(bins=8),
    "autoregressive": Tokens(bins=8, order="autoregressive"),
}
PAIRS = [
    *((head, kind) for head in HEADS for kind in ("velocity", "shortcut", "noise", "v")),
    ("expert", "parallel"),
    ("expert", "autoregressive"),
]


def small_config(**changes):
    return tiny_config(**{"cameras": ("top",), "action_dim": 4, "action_horizon": 3, "prompt_length": 5} | changes)


def path_names(tree) -> dict:
    return flatten_dict(tree, sep="/")


@pytest.mark.parametrize(("head", "kind"), PAIRS)
def test_a_few_updates_on_one_batch_lower_the_loss_and_reach_every_parameter(head, kind):
    # An image encoder, of which no objective knows, takes a third of the time to compile.
    config = small_config(head=HEADS[head], cameras=("top",) if kind in ("velocity", "parallel") else ())
    objective, rng = make_objective(OBJECTIVES[kind], config), np.random.default_rng(0)
    assert isinstance(objective.network, TokenNetwork if isinstance(OBJECTIVES[kind], Tokens) else Network)
    params = random_params(objective.network, rng)
    actions = jnp.asarray(rng.uniform(-1, 1, (4, 3, 4)), jnp.float32)
    batch = Batch(random_observation(config, 4, rng), actions, jnp.ones((4, 3), bool), jnp.ones((4, 4), bool))
    optimizer = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        (value, _), gradient = jax.value_and_grad(
            lambda params: loss(objective, params, batch, jax.random.key(0)), has_aux=True
        )(params)
        change, state = optimizer.update(gradient, state)
        reached = jax.tree.map(lambda x: jnp.any(x != 0), gradient)
        return (optax.apply_updates(params, change), state), (value, reached)

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=25)[1])
    losses, reached = run(params)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0], losses
    unreached = {name for name, each in path_names(reached).items() if not each.any()}
    # The action expert sees the prefix's keys and values, never its outputs.
    assert unreached == ({"backbone/language_norm/scale"} if head == "expert" else set())


@pytest.mark.parametrize("head", HEADS)
def test_a_shortcut_model_that_has_not_learnt_spans_is_the_velocity_of_the_same_weights(head):
    velocity, average = (make_head(small_config(head=HEADS[head]), span) for span in (False, True))
    rng = np.random.default_rng(0)
    params, observation = random_params(velocity, rng), random_observation(velocity.config, 2, rng)
    x, time = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32), jnp.array([0.3, 1.0])
    shapes = jax.eval_shape(lambda: nn.meta.unbox(average.init(jax.random.key(0))))
    added = {k: jnp.zeros(v.shape) for k, v in path_names(shapes).items() if k not in path_names(params)}
    assert {name.split("/")[0] for name in added} == {"span_in"}
    more = unflatten_dict(path_names(params) | added, sep="/")
    expected = jax.jit(velocity.joint)(params, observation, x, time)
    apply = jax.jit(average.joint)
    np.testing.assert_allclose(apply(more, observation, x, time), expected, atol=1e-6)
    np.testing.assert_allclose(apply(more, observation, x, time, jnp.full(2, 0.5)), expected, atol=1e-6)
    learnt = more | {"span_in": jax.tree.map(lambda leaf: leaf + 0.1, more["span_in"])}
    result = apply(learnt, observation, x, time, jnp.full(2, 0.5))
    assert np.abs(result - expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["shortcut", "autoregressive"])
def test_parameters_that_start_at_zero_or_small_name_their_axes(kind):
    shapes = jax.eval_shape(make_objective(OBJECTIVES[kind], small_config()).network.init, jax.random.key(0))
    for leaf in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim


def test_the_class_of_the_head_names_its_file():
    assert type(make_head(small_config())).__module__ == "pi0_jax.model.head.expert"
    assert type(make_head(small_config(head=Compact()))).__module__ == "pi0_jax.model.head.compact"
    assert type(make_tokens(small_config(), Tokens())).__module__ == "pi0_jax.model.head.tokens"
