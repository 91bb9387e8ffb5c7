"""π0-FAST of openpi and of LeRobot: logits, loss, gradients and decoded tokens, by our own objective and decoding."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.batch import Batch, Targets
from pi0_jax.config import Autoregressive, Fast
from pi0_jax.model import fold, mask
from pi0_jax.model.entropy import logits
from pi0_jax.model.writer import Block, Rules, greedy
from pi0_jax.objective import make_objective
from pi0_jax.objective.autoregressive import seen_by_prompt
from tests.parity.common import Case, folders, read_spec, relative_error

SKIP = "no fixtures of π0-FAST; set PI0_FIXTURES"


@pytest.fixture(scope="module", autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


class Fasts(Case):
    """A case whose network writes."""

    def __init__(self, folder, reduction: Literal["example", "token"], bos: bool = False):
        super().__init__(folder)
        config = Autoregressive(codec=Fast(bos=bos), reduction=reduction)
        self.objective = make_objective(config, dataclasses.replace(self.config, variant="pi0_fast"))
        self.network = self.objective.network

    def batch(self, observation, targets: Targets) -> Batch:
        steps = (len(targets.tokens), self.config.action_horizon)
        dims = (steps[0], self.config.action_dim)
        return Batch(observation, jnp.zeros((*steps, dims[1])), jnp.ones(steps, bool), jnp.ones(dims, bool), targets)

    def loss(self, params, batch: Batch):
        draws, count = self.objective.draw(batch, jax.random.key(0), 0)
        return self.objective.loss(params, draws, count)[0]

    def logits(self, observation, targets: Targets):
        blocks = [Block(targets.tokens, targets.mask)]
        (hidden,) = jax.jit(self.network.joint)(self.params, observation, blocks)
        return logits(hidden, self.params["embedding"])

    def decode(self, observation, count: int, params=None, like_openpi: bool = False):
        """Greedy tokens of the whole vocabulary, without an end."""

        @jax.jit
        def run(params, observation):
            prefix, hidden = self.network.read(params, observation)
            shape = len(hidden), len(params["embedding"])
            rules = Rules(
                params["embedding"],
                jnp.arange(shape[1]),
                jnp.zeros(shape[0]),
                lambda state: jnp.ones(shape, bool),
                lambda state, token: (state, jnp.zeros(shape[0], bool)),
            )
            written = self.network.decode(params, prefix, hidden, rules, count, greedy, like_openpi=like_openpi)
            return written.tokens

        return run(self.params if params is None else params, observation)


@pytest.mark.parametrize("folder", folders("lerobot_*", "pi0_fast"), ids=lambda folder: folder and folder.name)
def test_lerobots_logits_loss_gradients_and_tokens(folder):
    if folder is None:
        pytest.skip(SKIP)
    case = Fasts(folder, "token", bos=True)
    tokens, there = case.io["fast_tokens"], case.io["fast_mask"]
    targets = Targets(tokens, there, there & (jnp.arange(tokens.shape[1]) > 0)[None], there)
    found = case.logits(case.observation, targets)[:, 1:]
    valid = np.asarray(there)[:, 1:]
    assert relative_error(np.asarray(found)[valid], np.asarray(case.io["logits"])[:, :-1][valid]) <= 1e-5
    value, gradient = jax.jit(jax.value_and_grad(case.loss))(case.params, case.batch(case.observation, targets))
    np.testing.assert_allclose(value, case.io["loss"], rtol=1e-5)
    norms = {path: float(jnp.linalg.norm(x)) for path, x in flatten_dict(gradient, sep="/").items()}
    for path, name in (
        ("image_encoder/patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight"),
        ("image_encoder/patch_embedding/bias", "vision_model.embeddings.patch_embedding.bias"),
        ("image_projector/kernel", "multi_modal_projector.linear.weight"),
        ("backbone/language_norm/scale", "language_model.norm.weight"),
    ):
        (theirs,) = (n for key, n in zip(case.io["grad_names"], case.io["grad_norms"], strict=True) if name in key)
        np.testing.assert_allclose(norms[path], theirs, rtol=1e-4)
    stacked = [n for key, n in zip(case.io["grad_names"], case.io["grad_norms"], strict=True) if "mlp.down_proj" in key]
    ours = norms["backbone/layers/language/mlp/down"]
    np.testing.assert_allclose(ours, np.linalg.norm(stacked[: case.config.depth]), rtol=1e-4)


@pytest.mark.parametrize("folder", folders("lerobot_*", "pi0_fast"), ids=lambda folder: folder and folder.name)
def test_lerobots_greedy_tokens_with_its_bos_in_the_prompt(folder):
    if folder is None:
        pytest.skip(SKIP)
    case, bos = Fasts(folder, "token", bos=True), read_spec(folder)["bos"]
    o = case.observation
    # LeRobot trains a causal BOS, and decodes from one that the prompt sees (sampler.like).
    seen = seen_by_prompt(o, jnp.full((len(o.prompt), 1), bos))
    count = case.io["greedy_kv"].shape[1]
    np.testing.assert_array_equal(case.decode(seen, count), case.io["greedy_kv"])
    folded = fold.fold(case.network, fold.from_tree(case.params))
    np.testing.assert_array_equal(case.decode(seen, count, folded), case.io["greedy_kv"])


@pytest.mark.parametrize("folder", folders("openpi_*", "pi0_fast"), ids=lambda folder: folder and folder.name)
def test_openpis_logits_and_loss(folder, monkeypatch):
    if folder is None:
        pytest.skip(SKIP)
    # openpi numbers all tokens, absent ones too. Its prompts have no padding before the action tokens, so one example
    # after another is computed here.
    monkeypatch.setattr(mask, "positions", lambda group, valid, start=0: jnp.cumsum(jnp.ones_like(valid), axis=1) - 1)
    case = Fasts(folder, "example")
    for row in range(len(case.io["tokens"])):
        tokens, there, ar, learnt = (
            np.asarray(case.io[name])[row : row + 1] for name in ("tokens", "token_mask", "ar_mask", "loss_mask")
        )
        begin = int(np.argmax(ar[0]))
        observation = jax.tree.map(lambda x, row=row: x[row : row + 1], case.observation)
        observation = observation._replace(
            prompt=jnp.asarray(tokens[:, :begin]), prompt_mask=jnp.asarray(there[:, :begin])
        )
        targets = Targets(*(jnp.asarray(x[:, begin:]) for x in (tokens, there, learnt, there)))
        found, valid = case.logits(observation, targets), there[:, begin:]
        assert relative_error(found[valid], case.io["logits"][row : row + 1, begin - 1 :][valid]) <= 1e-5
        value = jax.jit(case.loss)(case.params, case.batch(observation, targets))
        np.testing.assert_allclose(value, case.io["loss"][row], rtol=1e-5)


@pytest.mark.parametrize("folder", folders("openpi_*", "pi0_fast"), ids=lambda folder: folder and folder.name)
def test_openpis_first_token_and_its_positions(folder):
    if folder is None:
        pytest.skip(SKIP)
    case = Fasts(folder, "example")
    prompt = {"prompt": case.io["prompt_tokens"], "prompt_mask": case.io["prompt_mask"]}
    observation = case.observation._replace(**prompt)
    theirs = case.io["greedy_8"]
    ours, sound = (case.decode(observation, theirs.shape[1], like_openpi=like) for like in (True, False))
    np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
    if all(case.io[f"image_masks/{name}"].all() for name in case.config.cameras):  # see test_openpi.py
        np.testing.assert_array_equal(ours, theirs)
    assert (ours != sound).any()


@pytest.mark.parametrize("folder", folders("openpi_*", "pi0_fast"), ids=lambda folder: folder and folder.name)
def test_openpis_rows_end_with_the_same_token_or_not_at_all(folder):
    if folder is None:
        pytest.skip(SKIP)
    case, room = Fasts(folder, "example"), 5

    @jax.jit
    def lengths(params, ends):
        """Tokens of rows that end after `ends` of them, as openpi has it."""
        prefix, hidden = case.network.read(params, case.observation)
        rules = Rules(
            params["embedding"],
            jnp.arange(len(params["embedding"])),
            jnp.zeros(len(ends), int),
            lambda count: jnp.ones((len(ends), len(params["embedding"])), bool),
            lambda count, token: (count + 1, count + 1 == ends),
        )
        found = case.network.decode(params, prefix, hidden, rules, room, greedy, like_openpi=True)
        return jnp.sum(found.mask, axis=1)

    rows = len(case.observation.prompt)
    assert rows > 1
    np.testing.assert_array_equal(lengths(case.params, jnp.full(rows, 2)), np.full(rows, 2))
    np.testing.assert_array_equal(lengths(case.params, 1 + jnp.arange(rows)), np.full(rows, room))
