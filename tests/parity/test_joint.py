"""π0.5's joint training and its text: losses, logits, gradients, exact zeros, greedy text, samples and guidance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.batch import Batch, Targets
from pi0_jax.config import Fast, Joint
from pi0_jax.model import fold
from pi0_jax.model.entropy import logits
from pi0_jax.model.writer import Block, Rules, greedy
from pi0_jax.objective import SampleOptions, gaussian, joint, make_objective
from pi0_jax.sampler import Euler
from tests.conftest import fixtures_root
from tests.parity.common import Case, relative_error

FOLDERS = sorted(fixtures_root().glob("pi05_joint_*")) or [None]
WEIGHTS = {
    True: {
        "text_ce": (1.0, 0.0, 0.0),
        "fast_ce": (0.0, 1.0, 0.0),
        "flow_insulated": (0.0, 0.0, 1.0),
        "total_alpha1_insulated": (1.0, 1.0, 1.0),
    },
    False: {"flow_open": (0.0, 0.0, 1.0), "total_alpha10_open": (1.0, 1.0, 10.0)},
}
"""By insulation, losses of the fixture to the weights of text, action tokens and flow."""
SAME = {
    "embedding": "paligemma.lm_head.weight",
    "image_projector/kernel": "multi_modal_projector.linear.weight",
    "action_out/kernel": "action_out_proj.weight",
}
"""Our parameters, and the reference's that are not stacked or split otherwise."""
LANGUAGE = ("image_encoder", "image_projector", "embedding", "backbone/layers/language", "backbone/language_norm")


@pytest.fixture(scope="module", autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


class Reference:
    """The fixture's batch as ours: text and action tokens without padding between them."""

    def __init__(self, folder):
        if folder is None:
            pytest.skip("no fixture of joint training; set PI0_FIXTURES")
        self.case = case = Case(folder)
        self.io = io = case.io
        text, fast = ((np.asarray(io[name]), np.asarray(io[f"{name}_mask"])) for name in ("text", "fast"))
        shape = len(text[0]), text[0].shape[1] + fast[0].shape[1]
        tokens, mask, is_action = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
        for row in range(shape[0]):
            first, then = (ids[row][there[row]] for ids, there in (text, fast))
            end = len(first) + len(then)
            tokens[row, :end], mask[row, :end] = [*first, *then], True
            is_action[row, len(first) : end] = True
        targets = Targets(*map(jnp.asarray, (tokens, mask, mask, is_action)))
        steps, dims = jnp.ones(io["actions"].shape[:2], bool), jnp.ones(io["actions"][:, 0].shape, bool)
        self.batch = Batch(case.observation, io["actions"], steps, dims, targets, io["has_actions"])
        codec = Fast(skip=16, max_tokens=fast[0].shape[1])
        self.config = Joint(codec=codec, text_tokens=text[0].shape[1], reduction="token")

    def objective(self, **changes):
        return make_objective(dataclasses.replace(self.config, **changes), self.case.config)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder and folder.name)
def reference(request):
    return Reference(request.param)


@pytest.mark.parametrize("insulate", [True, False])
def test_losses_gradients_and_exact_zeros(reference, insulate):
    objective, io = reference.objective(insulate=insulate), reference.io
    draws, count = jax.jit(objective.draw)(reference.batch, jax.random.key(0), 0)
    draws = draws._replace(noise=io["noise"][:, None], time=io["time"][:, None])

    def weighted(params, weights):
        metrics = objective.loss(params, draws, count)[1]
        losses = jnp.stack([metrics[f"loss_{name}"] for name in ("text", "tokens", "flow")])
        return jnp.dot(weights, losses), losses

    loss = jax.jit(jax.grad(weighted, has_aux=True))
    for name, weights in WEIGHTS[insulate].items():
        gradient, losses = loss(reference.case.params, jnp.array(weights))
        np.testing.assert_allclose(losses, [float(io[key]) for key in ("ce_text", "ce_fast", "flow")], rtol=1e-5)
        norms = {path: float(jnp.linalg.norm(x)) for path, x in flatten_dict(gradient, sep="/").items()}
        expected = dict(zip(map(str, io["grad_names"]), np.asarray(io[f"grad_norms/{name}"]), strict=True))
        for path, key in SAME.items():
            (theirs,) = (norm for name, norm in expected.items() if key in name)
            np.testing.assert_allclose(norms[path], theirs, rtol=1e-4, atol=1e-7)
        for own in (True, False):
            ours = [norm for path, norm in norms.items() if path.startswith(LANGUAGE) == own]
            theirs = [norm for name, norm in expected.items() if (".paligemma." in name) == own]
            np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(theirs), rtol=1e-4)
            if name == "flow_insulated" and own:
                assert set(ours) == {0.0}


def test_logits_and_velocity_of_the_joint_pass(reference):
    objective, io = reference.objective(), reference.io
    found = joint.parts(reference.config, reference.batch)
    blocks, draws = [part.block for part in found], objective.draw(reference.batch, jax.random.key(0), 0)[0]
    draws = draws._replace(noise=io["noise"][:, None], time=io["time"][:, None])
    it = gaussian.noisy(reference.config.flow, draws)
    run = jax.jit(lambda *args: objective.network.write_and_flow(*args, unseen=1))
    hidden, velocity = run(reference.case.params, it.observation, blocks, it.x, it.time)
    assert relative_error(velocity[:, 0], io["velocity"]) <= 2e-5
    chosen = [jax.nn.log_softmax(logits(outputs, reference.case.params["embedding"])) for outputs in hidden]
    for logp, part, name in zip(chosen, found, ("text", "fast"), strict=True):
        nll = -jnp.take_along_axis(logp, part.block.tokens[..., None], axis=-1)[..., 0]
        there = np.asarray(io[f"{name}_mask"])
        np.testing.assert_array_equal(part.learnt, there)
        assert relative_error(np.asarray(nll)[there], np.asarray(io[f"nll_{name}"])[there]) <= 1e-5


def test_greedy_text_and_actions_after_it(reference):
    objective, io = reference.objective(codec=None, text_tokens=reference.io["greedy_text"].shape[1]), reference.io
    network, params, observation = objective.network, reference.case.params, reference.case.observation
    params = fold.fold(network, fold.from_tree(params))
    rows, room = io["greedy_text"].shape

    def decode(end: int, eos: int):
        def run(params):
            prefix, hidden = network.read(params, observation)
            embedding = params["embedding"][:end]
            rules = Rules(
                embedding,
                jnp.arange(end),
                jnp.zeros(rows),
                lambda state: jnp.ones((rows, end), bool),
                lambda state, token: (state, token == eos),
            )
            return network.decode(params, prefix, hidden, rules, room, greedy)[:2]

        return jax.jit(run)(params)

    for name, end, eos in (("_stop114", reference.case.config.vocab_size, 114), ("_below240", 240, -1)):
        tokens, mask = decode(end, eos)
        np.testing.assert_array_equal(tokens, io[f"greedy_text{name}"])
        np.testing.assert_array_equal(mask, io[f"greedy_text{name}_mask"])
    options, noise = SampleOptions(Euler(10)), io["noise"]
    actions, text = jax.jit(lambda p: objective.write(p, observation, noise, options))(params)
    np.testing.assert_array_equal(text.tokens, io["greedy_text"])
    given = options._replace(text=Block(io["greedy_text"], io["greedy_text_mask"]))
    again, alone = (
        jax.jit(lambda p, how=how: objective.sample(p, observation, noise, how))(params) for how in (given, options)
    )
    for ours, theirs in ((actions, "after_greedy_text"), (again, "after_greedy_text"), (alone, "prompt_only")):
        assert relative_error(ours, io[f"sample_10_{theirs}"]) <= 1e-4


def test_guidance_between_contexts(reference):
    io, network = reference.io, reference.objective().network
    rows, observation = len(io["text"]), reference.case.observation

    def context(name: str | None) -> Block:
        if name is None:
            return Block(io["text"], io["text_mask"])
        added = jnp.broadcast_to(io[name][None], (rows, len(io[name])))
        return Block(
            jnp.concatenate([io["text"], added], axis=1),
            jnp.concatenate([io["text_mask"], jnp.ones(added.shape, bool)], axis=1),
        )

    read = jax.jit(lambda p, text: network.prefill(p, observation, text=text))
    params = reference.case.params
    positive, negative, none = (read(params, context(n)) for n in ("advantage_positive", "advantage_negative", None))
    velocity = jax.jit(network.velocity)
    for prefix, name in ((positive, "positive"), (negative, "negative")):
        ours = velocity(params, prefix, io["x_t"], io["time"])
        assert relative_error(ours, io[f"velocity_{name}"]) <= 2e-5
    for beta in (0.0, 1.0, 1.5, 2.5):
        x = io["noise"]
        for step in range(10):
            time = jnp.full(rows, 1 - step / 10, jnp.float32)
            with_it, without = (velocity(params, prefix, x, time) for prefix in (positive, none))
            x = x - 0.1 * (without + beta * (with_it - without))
        assert relative_error(x, io[f"cfg_beta_{beta}"]) <= 1e-4
