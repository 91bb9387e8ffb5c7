import jax.numpy as jnp
import numpy as np

from pi0_jax.model.mask import attention_mask, may_attend, positions


def test_prefix_state_and_draws_see_what_is_before_them_but_not_other_draws():
    mask_ar, group = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 2])
    expected = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    np.testing.assert_array_equal(may_attend(mask_ar, group), np.array(expected, bool))


def test_causal_tokens_are_blocks_of_one():
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(may_attend(np.array([0, 0, 1, 1]), np.zeros(4, int)), np.array(expected, bool))


def test_nobody_sees_invalid_tokens_and_all_see_valid_cached_ones():
    valid, cached = jnp.array([[True, False, True]]), jnp.array([[True, False]])
    mask = attention_mask(np.array([0, 0, 1]), np.zeros(3, int), valid, cached)
    expected = [[1, 0, 1, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 1]]
    np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_positions_count_valid_tokens_and_all_draws_begin_at_the_same_one():
    group = np.array([0, 0, 0, 1, 1, 2, 2])
    valid = jnp.array([[True] * 7, [True, False, True] + [True] * 4])
    np.testing.assert_array_equal(positions(group, valid), [[0, 1, 2, 3, 4, 3, 4], [0, 0, 1, 2, 3, 2, 3]])
    np.testing.assert_array_equal(positions(group[3:5], valid[:, 3:5], jnp.array([7, 9])), [[7, 8], [9, 10]])
