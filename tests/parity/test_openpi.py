"""Against openpi's own numbers: same weights, same inputs, float32, highest matmul precision.

Every folder `openpi_*` of the fixtures is tested, with and without adapters; sizes come from the tensors and from the
folder's `config.json`. Tolerances are relative errors in the L2 norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.convert.formats import openpi
from pi0_jax.flow.path import Straight, interpolate
from pi0_jax.model.gemma import Layout
from pi0_jax.model.layers import rotation
from tests.conftest import fixtures_root
from tests.parity.common import Case, folders, relative_error, run_language

SKIP = f"no such reference folders in {fixtures_root()}; set PI0_FIXTURES to where they are"


@pytest.fixture(scope="module", params=folders("openpi_*", "pi0", "pi05"), ids=lambda folder: folder and folder.name)
def case(request):
    if request.param is None:
        pytest.skip(SKIP)
    with jax.default_matmul_precision("highest"):
        yield Case(request.param)


def _squared_error(velocity, target):
    """Of each action, the mean over its dimensions."""
    return jnp.mean(jnp.square(velocity - target), axis=-1)


def test_prefix_tokens(case):
    tokens, mask = case.apply(case.observation, method="embed_prefix")
    np.testing.assert_array_equal(mask, case.io["prefix_mask"])
    assert relative_error(tokens, case.io["prefix_tokens"]) <= 1e-5


def test_velocity_and_loss(case):
    io = case.io
    x, target = interpolate(Straight(), io["actions"], io["noise"], io["time"])
    assert relative_error(x, io["x_t"]) <= 1e-6
    velocity = case.apply(case.observation, jnp.asarray(io["x_t"]), jnp.asarray(io["time"]))
    assert relative_error(velocity, io["velocity"]) <= 1e-5
    assert relative_error(_squared_error(velocity, target), io["loss_per_step"]) <= 1e-5


def test_velocity_from_the_cached_prefix(case):
    prefix = case.apply(case.observation, method="prefill")
    velocity = case.apply(prefix, jnp.asarray(case.io["x_t"]), jnp.asarray(case.io["time"]), method="velocity")
    assert relative_error(velocity, case.io["velocity"]) <= 1e-5


def test_training_loss_at_the_reference_draws(case):
    x, target = interpolate(Straight(), case.io["actions"], case.io["rng123_noise"], case.io["rng123_time"])
    velocity = case.apply(case.observation, jnp.asarray(x), jnp.asarray(case.io["rng123_time"]))
    assert relative_error(_squared_error(velocity, target), case.io["loss_rng123"]) <= 1e-5


def test_gradient_norm_of_every_parameter(case):
    io = case.io
    x, target = interpolate(Straight(), io["actions"], io["noise"], io["time"])

    def loss(params):
        velocity = case.network.joint(params, case.observation, jnp.asarray(x), jnp.asarray(io["time"]))
        return jnp.mean(_squared_error(velocity, target))

    norms = {
        name: float(jnp.linalg.norm(leaf))
        for name, leaf in flatten_dict(jax.jit(jax.grad(loss))(case.params), sep="/").items()
    }
    ours_of = {rule.theirs: rule.ours for rule in openpi.rules(case.config.variant) if rule.ours in norms}
    reference = {
        str(name).removesuffix("/value"): float(norm)
        for name, norm in zip(io["grad_names"], io["grad_norms"], strict=True)
    }
    assert {ours_of[name] for name in reference} == set(norms)
    # Rounding is all there is where the gradient is zero by construction, as for the bias of attention's keys.
    rounding = 1e-7 * np.linalg.norm(list(reference.values()))
    for name, norm in reference.items():
        assert norms[ours_of[name]] == pytest.approx(norm, rel=1e-4, abs=rounding), name


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_euler_samples(case, num_steps):
    sample = case.sample(case.io["noise"], num_steps)
    assert relative_error(sample, case.io[f"sample_{num_steps}"]) <= 1e-4


@pytest.mark.parametrize("folder", folders("openpi_*", "pi0_fast"), ids=lambda folder: folder and folder.name)
def test_fast_backbone_gives_the_teacher_forced_logits_and_loss(folder):
    if folder is None:
        pytest.skip(SKIP)
    with jax.default_matmul_precision("highest"):
        case = Case(folder)
        logits = case.logits(case.io["ar_mask"], count_masked=True, drop_last=1)
    valid = case.io["token_mask"][:, :-1]  # what an absent token would say next means nothing
    assert relative_error(np.asarray(logits)[valid], case.io["logits"][valid]) <= 1e-5
    chosen = np.take_along_axis(jax.nn.log_softmax(logits), case.io["tokens"][:, 1:, None], axis=-1)[..., 0]
    mask = case.io["loss_mask"][:, 1:]
    loss = -np.sum(chosen * mask, axis=1) / np.sum(mask, axis=1)
    assert relative_error(loss, case.io["loss"]) <= 1e-5


@pytest.mark.parametrize("folder", folders("openpi_*", "pi0_fast"), ids=lambda folder: folder and folder.name)
def test_fast_backbone_chooses_the_tokens_that_openpi_decoded(folder):
    if folder is None:
        pytest.skip(SKIP)
    with jax.default_matmul_precision("highest"):
        case = Case(folder)
        logits = np.asarray(_decoding_logits(case, case.io["greedy_8"]))
    margin = np.diff(np.sort(logits)[..., -2:])[..., 0]
    # openpi's decoding also looks at absent cameras, whose tokens are then what its padding makes of them; so overrides
    # that are close may fall the other way. None is where all cameras are there, nor for the first token.
    sure = margin > (0.0 if all(case.io[f"image_masks/{name}"].all() for name in case.config.cameras) else 0.01)
    sure[:, 0] = True
    assert sure.sum() > sure.size / 2
    np.testing.assert_array_equal(logits.argmax(-1)[sure], case.io["greedy_8"][sure])


def _decoding_logits(case, chosen):
    """Logits from which each of the chosen tokens was taken, in one pass.

    openpi's decoding differs from its training in two ways. Chosen tokens are one position further than those of a
    prompt would be. And they see as many tokens as the prefix has valid ones, counted from its end, which are others
    where a camera in between is absent.
    """
    count = chosen.shape[1]
    prompt = np.concatenate([case.io["prompt_tokens"], chosen], axis=1)
    mask = np.pad(case.io["prompt_mask"], ((0, 0), (0, count)), constant_values=True)
    observation = case.observation._replace(prompt=jnp.asarray(prompt), prompt_mask=jnp.asarray(mask))

    @jax.jit
    def run(params, observation):
        tokens, mask = case.network.embed_prefix(params, observation)
        prefix = mask[:, :-count]
        number, at = jnp.sum(prefix, axis=1), jnp.arange(prefix.shape[1])
        end = jnp.max(prefix * at[None], axis=1) + 1
        positions = jnp.concatenate(
            [jnp.cumsum(prefix, axis=1) - 1, number[:, None] + 1 + jnp.arange(count)[None]], axis=1
        )
        seen = (at[None] >= (end - number)[:, None]) & (at[None] < end[:, None])
        own = jnp.broadcast_to(jnp.tril(jnp.ones((count, count), bool)), (len(tokens), count, count))
        later = jnp.concatenate([jnp.repeat(seen[:, None], count, axis=1), own], axis=2)
        first = jnp.pad(prefix[:, None] & prefix[:, :, None], ((0, 0), (0, 0), (0, count)))
        allowed = jnp.concatenate([first, later], axis=1)
        language = run_language(case.config, params, tokens, Layout(rotation(positions, case.config.head_dim), allowed))
        before = jnp.tile(len(at) - 1 + jnp.arange(count), (len(end), 1)).at[:, 0].set(end - 1)
        return jnp.take_along_axis(language, before[..., None], axis=1) @ params["embedding"].T

    return run(case.params, observation)
