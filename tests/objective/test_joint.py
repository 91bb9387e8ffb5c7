"""What trains what in π0.5's joint objective, on a tiny network whose adaptive gates are open."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.config import Fast, Gaussian, Joint
from pi0_jax.errors import UserError
from pi0_jax.objective import gaussian, joint, make_objective
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


OWN = 13
"""Codes with a table of their own, of which each chunk has some after two tokens of the vocabulary that are given."""


def test_codes_with_a_table_and_a_head_of_their_own():
    codec = Fast(own_table=OWN, max_tokens=8)
    config = Joint(codec=codec, text_tokens=4, flow=CONFIG.flow, reduction="place")
    objective = make_objective(config, MODEL)
    params = random_params(objective.network, np.random.default_rng(0))
    place = jnp.cumsum(BATCH.targets.is_action, axis=1)
    codes = jnp.where(place > 2, MODEL.vocab_size + BATCH.targets.tokens % OWN, BATCH.targets.tokens)
    learnt = BATCH.targets.loss_mask & ((place == 0) | (place > 2))
    batch = BATCH._replace(targets=BATCH.targets._replace(tokens=codes, loss_mask=learnt))

    @jax.jit
    def run(params, weights):
        draws, counts = objective.draw(batch, jax.random.key(0), 0)
        _, metrics = objective.loss(params, draws, counts)
        text, actions = joint.parts(config, batch)
        it = gaussian.noisy(config.flow, draws)
        blocks = [text.block, actions.block]
        hidden, _ = objective.network.write_and_flow(params, it.observation, blocks, it.x, it.time, unseen=1)
        return jnp.dot(weights, jnp.stack([metrics[f"loss_{part}"] for part in PARTS])), (actions, hidden[1], metrics)

    gradient = jax.jit(jax.grad(run, has_aux=True))
    by_tokens, (actions, hidden, metrics) = gradient(params, jnp.array([0.0, 1.0, 0.0]))
    by_flow, _ = gradient(params, jnp.array([0.0, 0.0, 1.0]))
    # The loss as OpenTau has it: a linear head, and the mean over all places of codes, empty ones too.
    head, mask = params["code_head"], np.asarray(actions.learnt)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"])
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    code = np.asarray(actions.block.tokens) - MODEL.vocab_size
    nll = -np.take_along_axis(logp, np.maximum(code, 0)[..., None], axis=-1)[..., 0]
    assert mask.any()
    np.testing.assert_allclose(metrics["loss_tokens"], nll[mask].sum() / (len(nll) * (8 - 2)), rtol=1e-5)
    for gradient, trains in ((by_tokens, True), (by_flow, False)):
        norms = {path: float(jnp.abs(x).max()) for path, x in flatten_dict(gradient, sep="/").items()}
        for path, largest in norms.items():
            if path.startswith(("code_", *LANGUAGE)):
                assert (largest > 0) == trains, path
    # The table is not scaled by the root of the width, as words are.
    embedded = objective.network.embed_tokens(params, jnp.array([[MODEL.vocab_size + 3]]))
    np.testing.assert_array_equal(embedded[0, 0], params["code_embedding"][3])


def test_an_objective_without_any_tokens_is_refused():
    with pytest.raises(UserError, match="has no tokens to learn: give it text_tokens or a codec, or take Gaussian"):
        make_objective(Joint(codec=None, text_tokens=0), MODEL)
