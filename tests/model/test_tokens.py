import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.config import Compact, Tokens
from pi0_jax.errors import UserError
from pi0_jax.model.head import make_tokens
from tests.conftest import tiny_config
from tests.model.common import random_observation, random_params

COUNT, DIMS = 6, 3


class Tiny:
    """A tiny network over bins with random parameters and an observation."""

    def __init__(self, variant: str, order: str):
        self.config = tiny_config(variant, cameras=("top",), action_horizon=4)
        tokens = Tokens(bins=COUNT, dims=DIMS, order=order)
        self.network, rng = make_tokens(self.config, tokens), np.random.default_rng(3)
        self.params = random_params(self.network, rng)
        # Larger logits, so that the choice of each bin differs between observations.
        self.params["logits_out"] = jax.tree.map(lambda x: 4 * x, self.params["logits_out"])
        self.observation = random_observation(self.config, 3, rng)
        self._apply = jax.jit(self.network.logits)

    def __call__(self, bins):
        return self._apply(self.params, self.observation, bins)

    def decode(self):
        def run(params, observation):
            return self.network.decode(params, self.network.prefill(params, observation))

        return np.asarray(jax.jit(run)(self.params, self.observation))


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def sequence(request):
    return Tiny(request.param, "autoregressive")


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def parallel(request):
    return Tiny(request.param, "parallel")


def test_greedy_decoding_through_the_cache_chooses_what_one_pass_over_its_own_output_finds_likeliest(sequence):
    decoded = sequence.decode()
    assert decoded.shape == (3, 4, DIMS)
    assert len(np.unique(decoded)) > 1
    np.testing.assert_array_equal(np.argmax(sequence(decoded), axis=-1), decoded)


def test_a_bin_depends_on_those_before_it_and_on_none_after(sequence):
    bins = np.random.default_rng(0).integers(0, COUNT, (3, 4, DIMS))
    before = np.asarray(sequence(bins)).reshape(3, 12, COUNT)
    changed = bins.reshape(3, 12).copy()
    changed[:, 5] = (changed[:, 5] + 1) % COUNT
    after = np.asarray(sequence(changed.reshape(3, 4, DIMS))).reshape(3, 12, COUNT)
    np.testing.assert_allclose(after[:, :6], before[:, :6], atol=1e-5)
    assert (np.abs(after[:, 6:] - before[:, 6:]).max(axis=(0, 2)) > 1e-4).all()


def test_decoding_at_once_chooses_the_likeliest_of_every_bin_and_looks_at_none(parallel):
    decoded = parallel.decode()
    logits = parallel(np.zeros_like(decoded))
    assert logits.shape == (3, 4, DIMS, COUNT)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), decoded)
    np.testing.assert_array_equal(parallel(decoded), logits)


def test_the_observation_decides(sequence):
    bins = jnp.zeros((3, 4, DIMS), jnp.int32)
    logits = np.asarray(sequence(bins))
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_without_a_number_of_dimensions_all_of_them_have_bins():
    assert make_tokens(tiny_config(), Tokens()).dims == tiny_config().action_dim
    assert make_tokens(tiny_config(), Tokens(dims=2)).dims == 2


def test_a_head_without_action_tokens_is_refused():
    with pytest.raises(UserError, match="need the head Expert"):
        make_tokens(tiny_config(head=Compact()), Tokens())
