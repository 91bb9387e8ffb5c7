import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_jax.objective.tokens import cross_entropy, from_bins, to_bins


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.integers(1, 300))
def test_a_round_trip_is_off_by_half_a_bin_at_most(values, count):
    actions = np.array(values, np.float32)
    bins = np.asarray(to_bins(jnp.asarray(actions), count))
    assert bins.dtype == np.int32
    assert ((bins >= 0) & (bins < count)).all()
    assert np.abs(np.asarray(from_bins(jnp.asarray(bins), count)) - actions).max() <= 1 / count + 1e-6
    np.testing.assert_array_equal(to_bins(from_bins(jnp.asarray(bins), count), count), bins)


def test_actions_outside_go_to_the_outermost_bins():
    assert to_bins(jnp.array([-9.0, -1.0, 0.0, 1.0, 9.0]), 8).tolist() == [0, 0, 4, 7, 7]


def test_the_loss_is_the_cross_entropy_of_what_counts():
    logits, bins = jnp.log(jnp.array([[[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]])), jnp.array([[[1, 2]]])
    both, first = jnp.array([[[True, True]]]), jnp.array([[[True, False]]])
    np.testing.assert_allclose(cross_entropy(logits, bins, both), -np.log([0.25, 0.8]).mean(), rtol=1e-5)
    only_first = cross_entropy(logits.at[..., 1, :].set(jnp.nan), bins, first)
    np.testing.assert_allclose(only_first, -np.log(0.25), rtol=1e-5)
    assert cross_entropy(logits, bins, jnp.zeros((1, 1, 2), bool)) == 0
    np.testing.assert_allclose(cross_entropy(logits, bins, first, jnp.int32(2)), -np.log(0.25) / 2, rtol=1e-5)
