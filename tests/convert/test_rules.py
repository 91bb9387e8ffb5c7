import numpy as np
import pytest

from pi0_jax.config import ModelConfig
from pi0_jax.convert.lazy import in_memory, read_all
from pi0_jax.convert.parameters import infer_model
from pi0_jax.convert.rules import Parameter, Rule, bind, from_ours, to_ours

RULES = (
    Rule("q", "layers.{}.q", "(heads head_dim) embed"),
    Rule("kv", ("layers.{}.k", "layers.{}.v"), "head_dim embed"),
    Rule("out", "out", "embed vocab"),
    Rule("out", "tied", "embed vocab"),
)
WANTED = {
    "q": Parameter((3, 7, 2, 5), ("layers", "embed", "heads", "head_dim")),
    "kv": Parameter((3, 2, 7, 5), ("layers", "stack", "embed", "head_dim")),
    "out": Parameter((11, 7), ("vocab", "embed")),
}
OURS = {
    "q": np.arange(210.0, dtype=np.float32).reshape(3, 7, 2, 5),
    "kv": np.arange(210.0, dtype=np.float32).reshape(3, 2, 7, 5),
    "out": np.arange(77.0, dtype=np.float32).reshape(11, 7),
}


def theirs() -> dict[str, np.ndarray]:
    return read_all(from_ours(RULES, WANTED, {path: in_memory(array) for path, array in OURS.items()}))


def in_tensors(arrays):
    return {name: in_memory(array) for name, array in arrays.items()}


def test_axes_move_as_the_rule_says():
    found = theirs()
    assert set(found) == {*(f"layers.{i}.{name}" for i in range(3) for name in "qkv"), "out", "tied"}
    np.testing.assert_array_equal(found["layers.1.q"], OURS["q"][1].transpose(1, 2, 0).reshape(10, 7))
    np.testing.assert_array_equal(found["layers.2.v"], OURS["kv"][2, 1].T)
    np.testing.assert_array_equal(found["out"], OURS["out"].T)


def test_rules_read_backwards_give_the_same_parameters():
    tensors = in_tensors(theirs())
    rules, left_over = bind(RULES, WANTED, tensors, spare={"tied": (7, 11)})
    assert left_over == ["tied"]
    back = to_ours(rules, WANTED, tensors)
    for path, array in OURS.items():
        np.testing.assert_array_equal(back[path].read(None), array)
        np.testing.assert_array_equal(back[path].read(2), array[2])
        np.testing.assert_array_equal(back[path].read(slice(1, 3)), array[1:3])


def test_a_product_that_stays_open_is_asked_for_by_name():
    rules = (Rule("backbone/layers/language/attn/q", "layers.{}.q", "(heads head_dim) embed"),)
    with pytest.raises(ValueError, match="--num-heads"):
        infer_model(rules, in_tensors({"layers.0.q": np.zeros((10, 7), np.float32)}), ModelConfig(), {})


def test_all_that_does_not_correspond_is_named():
    broken = theirs()
    broken["layers.1.q"] = broken["layers.1.q"].T
    broken["odd"] = broken.pop("layers.2.v")
    tensors = in_tensors(broken)
    with pytest.raises(ValueError, match="do not match the inferred architecture") as error:
        bind(RULES, WANTED, tensors, spare={"tied": (7, 11)})
    message = str(error.value)
    assert "layers.1.q has shape (7, 10), and (10, 7) is needed for q" in message
    assert "missing: layers.2.v, for kv" in message
    assert "unexpected: odd" in message


def test_what_may_be_left_over_has_to_have_its_shape():
    broken = {**theirs(), "tied": theirs()["tied"].T}
    tensors = in_tensors(broken)
    with pytest.raises(ValueError, match=r"tied has shape \(11, 7\); unused as it is, it should have \(7, 11\)"):
        bind(RULES, WANTED, tensors, spare={"tied": (7, 11)})


def test_a_leaf_without_a_place_is_named():
    with pytest.raises(ValueError, match="no place for these of our parameters: stem"):
        from_ours(RULES, {**WANTED, "stem": Parameter((7,), ("embed",))}, in_tensors(OURS))
