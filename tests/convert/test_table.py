import numpy as np
import pytest

from pi0_jax.convert.table import Rule, convert_in

RULES = (Rule("a", "x/a"), Rule("b", "x/b", "l d n -> l n d"))
SOURCE = {"x/a": np.arange(3.0), "x/b": np.arange(24.0).reshape(2, 3, 4)}
TARGET = {"a": np.zeros(3), "b": np.zeros((2, 4, 3))}


def test_leaves_are_renamed_and_their_axes_moved():
    filled = convert_in(RULES, SOURCE, TARGET)
    np.testing.assert_array_equal(filled["a"], SOURCE["x/a"])
    np.testing.assert_array_equal(filled["b"], SOURCE["x/b"].transpose(0, 2, 1))


def test_all_that_does_not_correspond_is_named():
    with pytest.raises(ValueError, match="fit the model") as error:
        convert_in(RULES, {"x/a": np.zeros(4), "x/c": np.zeros(1)}, TARGET)
    message = str(error.value)
    assert "x/a gives a shape (4,), needs (3,)" in message
    assert "nothing in the source for b" in message
    assert "no use for the source's x/c" in message
