"""Whole episodes are looked at, as many as fit."""

import numpy as np
import pytest

from pi0_jax.diagnose.frames import EPISODES, choose, in_batches


@pytest.mark.parametrize("lengths", [[30] * 100, [5, 900, 40, 300] * 10, [400] * 3, [1]])
@pytest.mark.parametrize("frames", [16, 256, 4096])
def test_chunks_fit_and_are_no_further_apart_than_a_chunk_is_long(lengths, frames):
    lengths = np.array(lengths)
    chosen, every = choose(lengths, frames, 4, 20)
    count = (-(-lengths[chosen] // every)).sum()
    assert 4 <= every <= 20
    assert count <= frames or len(chosen) == 1
    assert (np.diff(chosen) > 0).all()
    if every < 20:
        assert len(chosen) >= min(EPISODES, len(lengths)) - 1


def test_chunks_are_where_the_policy_replans_if_there_is_room():
    chosen, every = choose(np.full(20, 40), 1000, 4, 20)
    assert (len(chosen), every) == (20, 4)
    assert choose(np.full(20, 40), 1000, 50, 20)[1] == 20


def test_batches_are_of_one_size_and_nothing_is_lost():
    sizes = []

    def double(x, tree):
        sizes.append(len(x))
        return x + tree["y"]

    x = np.arange(10)
    np.testing.assert_array_equal(in_batches(double, 4, "doubling")(x, {"y": x}), 2 * x)
    assert sizes == [4, 4, 4]
