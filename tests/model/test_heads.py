"""Every head with every prediction learns, with all of its parameters; and one network may stand in for another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax import pi0
from pi0_jax.batch import Batch
from pi0_jax.config import BinConfig, FlowConfig
from pi0_jax.model.heads import make_network
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

PAIRS = [
    *((head, kind) for head in ("expert", "compact") for kind in ("velocity", "average_velocity", "epsilon", "v")),
    ("expert", "bins"),
    ("expert", "bin_sequence"),
]


def small_config(**changes):
    return tiny_config(**{"cameras": ("top",), "action_dim": 4, "action_horizon": 3, "prompt_length": 5} | changes)


def path_names(tree) -> dict:
    return flatten_dict(tree, sep="/")


@pytest.mark.parametrize(("head", "prediction"), PAIRS)
def test_a_few_updates_on_one_batch_lower_the_loss_and_reach_every_parameter(head, prediction):
    config = small_config(head=head, prediction=prediction, bins=BinConfig(count=8))
    network, rng = make_network(config), np.random.default_rng(0)
    params = random_params(network, rng)
    actions = jnp.asarray(rng.uniform(-1, 1, (4, 3, 4)), jnp.float32)
    batch = Batch(random_observation(config, 4, rng), actions, jnp.ones((4, 3), bool), jnp.ones((4, 4), bool))
    optimizer = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        (value, _), gradient = jax.value_and_grad(
            lambda params: pi0.loss(network, params, batch, jax.random.key(0), FlowConfig(time="uniform")), has_aux=True
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


@pytest.mark.parametrize("head", ["expert", "compact"])
def test_a_shortcut_model_that_has_not_learnt_spans_is_the_velocity_of_the_same_weights(head):
    velocity = make_network(small_config(head=head))
    average = make_network(small_config(head=head, prediction="average_velocity"))
    rng = np.random.default_rng(0)
    params, observation = random_params(velocity, rng), random_observation(velocity.config, 2, rng)
    x, time = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32), jnp.array([0.3, 1.0])
    shapes = jax.eval_shape(lambda: nn.meta.unbox(pi0.init_params(average, jax.random.key(0))))
    added = {k: jnp.zeros(v.shape) for k, v in path_names(shapes).items() if k not in path_names(params)}
    assert {name.split("/")[0] for name in added} == {"span_in"}
    more = unflatten_dict(path_names(params) | added, sep="/")
    expected = jax.jit(velocity.apply)({"params": params}, observation, x, time)
    apply = jax.jit(average.apply)
    np.testing.assert_allclose(apply({"params": more}, observation, x, time), expected, atol=1e-6)
    np.testing.assert_allclose(apply({"params": more}, observation, x, time, jnp.full(2, 0.5)), expected, atol=1e-6)
    learnt = more | {"span_in": jax.tree.map(lambda leaf: leaf + 0.1, more["span_in"])}
    result = apply({"params": learnt}, observation, x, time, jnp.full(2, 0.5))
    assert np.abs(result - expected).max() > 1e-3


@pytest.mark.parametrize("prediction", ["average_velocity", "bin_sequence"])
def test_parameters_that_start_at_zero_or_small_are_finite_and_name_their_axes(prediction):
    shapes = jax.eval_shape(
        lambda: pi0.init_params(make_network(small_config(prediction=prediction)), jax.random.key(0))
    )
    for leaf in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "compacted"}, "unknown head 'compacted'; choose expert or compact"),
        ({"prediction": "speed"}, "unknown prediction 'speed'; choose velocity"),
        ({"head": "compact", "prediction": "bins"}, "'bins' needs the head 'expert'; it is 'compact'"),
    ],
)
def test_what_does_not_exist_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_network(small_config(**changes))
