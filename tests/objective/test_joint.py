"""What trains what in π0.5's joint objective, on a tiny network whose adaptive gates are open."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.config import Fast, Gaussian, Joint
from pi0_jax.errors import UserError
from pi0_jax.objective import make_objective
from tests.batches import random_batch
from tests.conftest import tiny_config
from tests.model.common import random_params

LANGUAGE = ("image_encoder", "image_projector", "embedding", "backbone/layers/language", "backbone/language_norm")
PARTS = ("text", "tokens", "flow")
MODEL = tiny_config("pi05", depth=1)
CONFIG = Joint(codec=Fast(skip=4, max_tokens=8), text_tokens=4, flow=Gaussian(draws=2))
BATCH = random_batch(MODEL, 4, 0, CONFIG.target_length)._replace(has_actions=jnp.ones(4, bool))


@functools.cache
def program(insulate: bool, remat: str):
    config = Joint(codec=CONFIG.codec, text_tokens=4, insulate=insulate, flow=CONFIG.flow)
    objective = make_objective(config, tiny_config("pi05", depth=1, remat=remat))
    params = random_params(objective.network, np.random.default_rng(0))  # gates, which start at zero, are not

    @jax.jit
    def gradient(batch, weights):
        draws, count = objective.draw(batch, jax.random.key(0), 0)

        def loss(params):
            _, metrics = objective.loss(params, draws, count)
            losses = jnp.stack([metrics[f"loss_{part}"] for part in PARTS])
            return jnp.dot(weights, losses), losses

        gradient, losses = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda x: jnp.abs(x).max(), gradient), losses

    return gradient


def gradient_of(part: str, insulate: bool = True, remat: str = "none", batch=BATCH):
    """The largest gradient of each parameter by one part of the loss, and all parts."""
    weights = jnp.array([float(name == part) for name in PARTS])
    found, losses = program(insulate, remat)(batch, weights)
    return {path: float(x) for path, x in flatten_dict(found, sep="/").items()}, losses


@pytest.mark.parametrize("remat", ["none", "full"])
def test_with_insulation_the_flows_gradient_of_the_backbone_is_exactly_zero(remat):
    insulated, _ = gradient_of("flow", True, remat)
    for path, largest in insulated.items():
        assert (largest == 0.0) == path.startswith(LANGUAGE), path


def test_without_insulation_it_is_not():
    found, _ = gradient_of("flow", False)
    unread = {path for path, largest in found.items() if largest == 0.0}
    last = {"attn/q", "attn/o", "mlp_norm/scale", "mlp/gate_up", "mlp/down"}  # the flow reads keys and values alone
    assert unread == {"backbone/language_norm/scale", *(f"backbone/layers/language/{name}" for name in last)}


@pytest.mark.parametrize("part", ["text", "tokens"])
def test_tokens_train_the_backbone_alone(part):
    found, _ = gradient_of(part)
    for path, largest in found.items():
        assert (largest > 0) == path.startswith(LANGUAGE), path


def test_the_flow_does_not_see_action_tokens():
    targets = BATCH.targets
    tokens = jnp.where(targets.is_action, (targets.tokens + 1) % MODEL.vocab_size, targets.tokens)
    before, after = (
        gradient_of("flow", batch=BATCH._replace(targets=targets._replace(tokens=ids)))[1]
        for ids in (targets.tokens, tokens)
    )
    np.testing.assert_array_equal(before == after, [True, False, True])


def test_examples_without_actions_do_not_train_the_flow():
    found, losses = gradient_of("flow", batch=BATCH._replace(has_actions=jnp.zeros(4, bool)))
    assert set(found.values()) == {0.0}
    assert losses[0] > 0
    assert losses[2] == 0


def test_an_objective_without_any_tokens_is_refused():
    with pytest.raises(UserError, match="has no tokens to learn: give it text_tokens or a codec, or take Gaussian"):
        make_objective(Joint(codec=None, text_tokens=0), MODEL)
