import numpy as np
import pytest

from pi0_jax.convert.lazy import in_memory, read_all
from pi0_jax.convert.rules import Rule, bind, from_ours, infer_sizes, to_ours

RULES = (
    Rule("q", "layers.{l}.q", "l (n h) d"),
    Rule("kv", ("layers.{l}.k", "layers.{l}.v"), "l c h d"),
    Rule("out", "out", "d v"),
    Rule("out", "tied", "d v"),
)
LEAVES = {"q": "l d n h", "kv": "l c d h", "out": "v d"}
SIZES = {"l": 3, "c": 2, "n": 2, "h": 5, "d": 7, "v": 11}
OURS = {
    "q": np.arange(210.0, dtype=np.float32).reshape(3, 7, 2, 5),
    "kv": np.arange(210.0, dtype=np.float32).reshape(3, 2, 7, 5),
    "out": np.arange(77.0, dtype=np.float32).reshape(11, 7),
}


def theirs() -> dict[str, np.ndarray]:
    return read_all(from_ours(RULES, LEAVES, {path: in_memory(array) for path, array in OURS.items()}, SIZES))


def in_tensors(arrays):
    return {name: in_memory(array) for name, array in arrays.items()}


def test_axes_move_as_the_rule_says():
    found = theirs()
    assert set(found) == {*(f"layers.{i}.{name}" for i in range(3) for name in "qkv"), "out", "tied"}
    np.testing.assert_array_equal(found["layers.1.q"], OURS["q"][1].transpose(1, 2, 0).reshape(10, 7))
    np.testing.assert_array_equal(found["layers.2.v"], OURS["kv"][2, 1].T)
    np.testing.assert_array_equal(found["out"], OURS["out"].T)


def test_a_table_read_backwards_gives_the_same_leaves_whole_and_by_layer():
    tensors = in_tensors(theirs())
    sizes = infer_sizes(RULES, tensors, {"n": 2})
    assert sizes == {**SIZES, "b": 3}
    rules, rest = bind(RULES, LEAVES, tensors, sizes, spare={"tied": "d v"})
    assert rest == ["tied"]
    back = to_ours(rules, LEAVES, tensors, sizes)
    for path, array in OURS.items():
        np.testing.assert_array_equal(back[path].read(None), array)
        np.testing.assert_array_equal(back[path].read(2), array[2])
        np.testing.assert_array_equal(back[path].read(slice(1, 3)), array[1:3])


def test_a_product_that_stays_open_is_asked_for_by_name():
    rules = (Rule("q", "layers.{l}.q", "l (n k) d"),)
    with pytest.raises(ValueError, match="--num-heads"):
        infer_sizes(rules, in_tensors({"layers.0.q": np.zeros((10, 7), np.float32)}), {})


def test_all_that_does_not_correspond_is_named():
    broken = theirs()
    broken["layers.1.q"] = broken["layers.1.q"].T
    broken["odd"] = broken.pop("layers.2.v")
    tensors = in_tensors(broken)
    with pytest.raises(ValueError, match="do not make the model") as error:
        bind(RULES, LEAVES, tensors, infer_sizes(RULES, tensors, {"n": 2}), spare={"tied": "d v"})
    message = str(error.value)
    assert "layers.1.q has shape (7, 10), and (10, 7) is needed for q" in message
    assert "missing: layers.2.v, for kv" in message
    assert "of no use: odd" in message


def test_what_may_be_left_over_has_to_have_its_shape():
    broken = {**theirs(), "tied": theirs()["tied"].T}
    tensors = in_tensors(broken)
    with pytest.raises(ValueError, match=r"tied has shape \(11, 7\); it is not needed, and \(7, 11\) is what"):
        bind(RULES, LEAVES, tensors, infer_sizes(RULES, tensors, {"n": 2}), spare={"tied": "d v"})


def test_a_leaf_without_a_place_is_named():
    with pytest.raises(ValueError, match="no place for these of our parameters: stem"):
        from_ours(RULES, {**LEAVES, "stem": "d"}, in_tensors(OURS), SIZES)
