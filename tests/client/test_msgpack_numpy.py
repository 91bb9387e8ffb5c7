"""Frames: openpi's bytes, and the limits of what is decoded."""

import ast
import contextlib
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pi0_client
import pi0_jax.serving
from pi0_client.msgpack_numpy import Limits, WireError, pack, unpack


def array_frame(data=b"\0" * 8, dtype="<f4", shape=(2,), **changes):
    entry = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape)} | changes
    return msgpack.packb({"x": entry})


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64", "bool", "float16", ">f4", "<U5"])
def test_arrays_and_scalars_come_back_as_they_were(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    out = unpack(pack({"nested": {"x": array, "scalar": array[1, 2]}, "text": "é", "list": [1, None, True]}))
    np.testing.assert_array_equal(out["nested"]["x"], array)
    assert out["nested"]["x"].dtype == array.dtype
    assert out["nested"]["scalar"] == array[1, 2]
    assert out["text"] == "é"
    assert out["list"] == [1, None, True]


def test_the_bytes_are_openpis():
    array = np.array([[1, 2]], "<f4")
    expected = {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": (1, 2)}
    assert pack({"x": array}) == msgpack.packb({"x": expected})
    assert pack(np.float32(2)) == msgpack.packb({b"__npgeneric__": True, b"data": 2.0, b"dtype": "<f4"})


def test_arrays_are_read_only_views_without_a_copy():
    out = unpack(pack(np.zeros(3)))
    with pytest.raises(ValueError, match="read-only"):
        out[0] = 1


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.zeros(2, np.complex64), np.zeros(2, ml_dtypes.bfloat16), object(), {1, 2}]
)
def test_what_cannot_be_sent_is_refused_with_its_type(value):
    with pytest.raises(WireError, match="cannot be sent"):
        pack({"x": value})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "incomplete"),
        (msgpack.packb({"a": 1}) + b"\0", "extra data"),
        (array_frame()[:-2], "incomplete"),
        (array_frame(dtype="|O"), "of type"),
        (array_frame(dtype="f4,f4"), "of type"),
        (array_frame(dtype="(9999999,)f4"), "of type"),
        (array_frame(dtype="<M8"), "of type"),
        (array_frame(dtype="<f3"), "no type"),
        (array_frame(dtype=[["a", "f4"]]), "of type"),
        (array_frame(shape=(3,)), "came with 8 bytes"),
        (array_frame(shape=(-1, -2)), "whole numbers"),
        (array_frame(shape=(2**40, 2**40)), "whole numbers"),
        (array_frame(shape=(True, 2)), "whole numbers"),
        (array_frame(shape=(1,) * 5 + (2,)), "at most 4"),
        (array_frame(data="text"), "have to be bytes"),
        (msgpack.packb({b"__ndarray__": True}), "lacks"),
        (msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}), "scalar came as list"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "cannot be decoded"),
        (msgpack.packb({1: 2}), "cannot be decoded"),
        (msgpack.packb(msgpack.ExtType(1, b"x")), "exceeds max_ext_len|extension type"),
        (msgpack.packb("é")[:1] + b"\xff\xff", "cannot be decoded"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len.*Send arrays as arrays"),
        (b"\xdf\xff\xff\xff\xff", "max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete"),
        (b"\x91" * 10 + b"\xc0", "nested"),
        (b"\xc1", "cannot be decoded"),
    ],
)
def test_damaged_and_hostile_frames_are_refused_with_the_reason(frame, message):
    with pytest.raises(WireError, match=message):
        unpack(frame)


def test_limits_hold():
    limits = Limits(frame_bytes=100, array_bytes=16)
    with pytest.raises(WireError, match="101 bytes; at most 100"):
        unpack(b"\xc4" + struct.pack("B", 99) + b"\0" * 99, limits)
    with pytest.raises(WireError, match="17 bytes; at most 16"):
        unpack(array_frame(b"\0" * 17, "|u1", (17,)), limits)
    with pytest.raises(WireError, match="more than 20000 values"):
        unpack(msgpack.packb([[0] * 1000] * 21))
    with pytest.raises(WireError, match="nested"):
        unpack(msgpack.packb({"a": [{"b": [[]]}]}), Limits(depth=4))
    assert unpack(msgpack.packb({"a": [{"b": [[]]}]}), Limits(depth=5)) == {"a": [{"b": [[]]}]}


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdc\x27\x10" + (b"\xdc\x27\x10" + b"\x90" * 10_000) * 3_000,  # 10 000 lists of 10 000 lists
        b"\xdc\x03\xff" + (b"\xdc\x03\xff" + b"\x90" * 1023) * 1023,
        (b"\xdc\x03\xff" + b"\xcb" + b"\x01" * 8) * 1000 + b"\xc0",  # each announces 1023 values
        b"\xdf\x00\x00\x03\xff"
        + b"".join(b"\xa4%04d" % n + b"\xdc\x03\xff" + b"\xcd\x7f\xff" * 1023 for n in range(2000)),
    ],
    ids=["longer than allowed", "many", "nested", "numbers"],
)
def test_frames_of_lists_allocate_little_memory(frame):
    tracemalloc.start()
    with pytest.raises(WireError, match=r"values|max_array_len|incomplete"):
        unpack(frame[: 30 << 20])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (12 << 20)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_decoded_or_refused_and_nothing_else(frame):
    with contextlib.suppress(WireError):
        unpack(frame)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_all_that_msgpack_writes_is_decoded(value):
    assert unpack(msgpack.packb(value), Limits(depth=50)) == value


def test_no_pickle_is_within_reach_of_the_network():
    for path in (path for package in (pi0_client, pi0_jax.serving) for path in Path(package.__path__[0]).glob("*.py")):
        names = {node.names[0].name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)}
        assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, path
