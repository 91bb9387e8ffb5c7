"""FAST action tokens: what goes in comes out, and nothing that comes in stops the decoder."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0_jax.data import fast
from pi0_jax.data.fast import FastCodec, bytes_to_values, quantize, round_trip, to_text
from pi0_jax.errors import UserError

pytest.importorskip("tokenizers")
HORIZON, DIMS = 8, 3


def walks(count: int, horizon: int = HORIZON, dims: int = DIMS, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, horizon, dims)).cumsum(1) / 4).astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> FastCodec:
    return FastCodec.fit([walks(300)], num_codes=400)


def foreign(texts: list[str], values: int, min_token: int = -20, **config) -> FastCodec:
    """A codec fitted as others do: the alphabet is characters where it should be their bytes."""
    bpe = fast.train_bpe(texts, 400, [chr(value) for value in range(values)])
    return FastCodec(bpe.to_str().encode(), json.dumps({"scale": 10, "min_token": min_token, **config}).encode())


def test_a_chunk_comes_back_within_half_a_step_of_the_scale(codec):
    chunks = walks(100, seed=1)
    decoded, valid = codec.decode(codec.encode(chunks), HORIZON, DIMS)
    inside = (np.abs(quantize(chunks, 10)) <= min(-codec.min_token, codec.max_token)).all((1, 2))
    assert inside.sum() > 90
    assert valid[inside].all()
    # The transform keeps lengths: no coefficient is off by more than half a step, so no action by more than their norm.
    error = np.linalg.norm((decoded - chunks)[inside], axis=1)
    assert error.max() <= 0.05 * np.sqrt(HORIZON) + 1e-6
    report = round_trip(codec, chunks[inside])
    np.testing.assert_allclose(report.error, np.sqrt(np.square((decoded - chunks)[inside]).mean((0, 1))), rtol=1e-5)
    assert report.lossy == 0
    assert report.lengths.tolist() == [len(codes) for codes in codec.encode(chunks[inside])]
    assert report.used.sum() == len({code for codes in codec.encode(chunks[inside]) for code in codes})


def test_any_value_has_codes_even_if_the_fit_never_saw_it(codec):
    for size in (0, 5, 30, 200, 3000):
        codes = codec.encode(np.full((1, HORIZON, DIMS), float(size)))[0]
        assert codec.count_values(codes) == HORIZON * DIMS
        assert codec.decode([codes], HORIZON, DIMS)[0].max() <= codec.max_token / 10 / np.sqrt(HORIZON) + 1e-6


def test_a_finer_scale_costs_codes_and_gains_accuracy():
    chunks = walks(300)
    reports = [round_trip(FastCodec.fit([chunks], 400, scale), chunks) for scale in (3.0, 10.0, 30.0)]
    lengths, errors = [r.lengths.mean() for r in reports], [r.error.max() for r in reports]
    assert lengths == sorted(lengths)
    assert errors == sorted(errors, reverse=True)


def test_the_same_chunks_give_the_same_codec_which_fits_in_a_folder(codec, tmp_path):
    again = FastCodec.fit([walks(300)], num_codes=400)
    assert (again.tokenizer, again.processor) == (codec.tokenizer, codec.processor)
    codec.save(tmp_path / "fast")
    loaded = FastCodec.load(tmp_path / "fast")
    assert loaded.files() == codec.files()
    assert {file.name: file.read_bytes() for file in (tmp_path / "fast").iterdir()} == codec.files()
    assert (loaded.horizon, loaded.dims, loaded.scale) == (HORIZON, DIMS, 10)
    assert (loaded.min_token, loaded.max_token) == (quantize(walks(300), 10).min(), quantize(walks(300), 10).max())
    with pytest.raises(OSError, match="fast"):
        codec.save(tmp_path / "fast")


def test_chunks_of_several_shapes_make_one_codec():
    codec = FastCodec.fit([walks(100), walks(100, dims=5)], 300)
    assert codec.horizon is codec.dims is None
    assert round_trip(codec, walks(100, dims=5)).lossy == 0


def test_text_that_is_too_short_or_too_long_is_filled_up_or_cut(codec):
    chunk = walks(1, seed=2)
    codes = codec.encode(chunk)[0]
    values = quantize(chunk, 10).reshape(-1)
    decoded, valid = codec.decode([codes, codes[:-1], codes + codes[:4], []], HORIZON, DIMS)
    assert valid.tolist() == [True, False, False, False]
    short = np.where(np.arange(HORIZON * DIMS) < codec.count_values(codes[:-1]), values, 0)
    np.testing.assert_array_equal(quantize(decoded[:3], 10).reshape(3, -1), [values, short, values])
    assert not decoded[3].any()


def test_codes_that_do_not_exist_stand_for_nothing(codec):
    codes = codec.encode(walks(1))[0]
    decoded, valid = codec.decode([codes, [-1, *codes[:3], codec.num_codes, *codes[3:]]], HORIZON, DIMS)
    np.testing.assert_array_equal(decoded[0], decoded[1])
    assert valid.tolist() == [True, False]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=60))
def test_any_string_decodes_into_the_codecs_range(codec, codes):
    codes = [code for code in codes if code < codec.num_codes]
    decoded, valid = codec.decode([codes], HORIZON, DIMS)
    values = quantize(decoded, 10)
    assert codec.min_token <= values.min()
    assert values.max() <= codec.max_token
    if valid:
        assert codec.count_values(codes) == HORIZON * DIMS


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=12))
def test_bytes_become_code_points_as_utf_8_says_where_they_are_well_formed(content):
    values, well_formed = bytes_to_values(np.frombuffer(content, np.uint8))
    assert len(values) == sum(byte & 0xC0 != 0x80 for byte in content)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    assert well_formed
    assert values.tolist() == [ord(character) for character in text]


@pytest.mark.parametrize("content", [b"\x80", b"\xc2", b"a\x80", b"\xc2\x80\x80", b"\xe2\x82"])
def test_bytes_that_are_no_utf_8_are_noticed(content):
    assert not bytes_to_values(np.frombuffer(content, np.uint8))[1]


def test_the_tables_give_the_bytes_of_the_text(codec):
    assert codec.code_bytes.shape == (codec.num_codes, codec.num_bytes.max())
    chunk = walks(1, seed=3)
    text = to_text(quantize(chunk, 10) - codec.min_token)[0]
    (codes,) = codec.encode(chunk)
    assert b"".join(bytes(codec.code_bytes[code, : codec.num_bytes[code]]) for code in codes) == text.encode()
    assert codec.num_values[codes].sum() == HORIZON * DIMS


def test_a_foreign_fit_loses_bytes_as_its_own_processor_does():
    codec = foreign(to_text(np.arange(20).reshape(-1, 5, 2) + 10), 41)
    assert (codec.min_token, codec.max_token) == (-20, 20)
    lost = np.zeros((1, 5, 2))
    lost[..., 0] = 1.1 / np.sqrt(5)  # a coefficient of 11, so the character U+001F, which the fit never saw
    (codes,) = codec.encode(lost)
    assert codec.count_values(codes) == 9
    assert not codec.decode([codes], 5, 2)[1].any()


def test_what_is_no_codec_says_what_one_is(tmp_path, codec):
    with pytest.raises(FileNotFoundError, match=re.escape("pi0 data fast CONFIG --output FOLDER")):
        FastCodec.load(tmp_path)
    codec.save(tmp_path / "fast")
    (tmp_path / "fast" / "processor_config.json").write_text('{"scale": 10}')
    with pytest.raises(UserError, match=r"fast is no FAST codec.*min_token"):
        FastCodec.load(tmp_path / "fast")
    with pytest.raises(UserError, match="is no FAST codec"):
        FastCodec(b"{}", codec.processor)
    with pytest.raises(UserError, match="200 codes are too few"):
        FastCodec.fit([walks(3)], 200)
    with pytest.raises(UserError, match="Are the actions normalised"):
        FastCodec.fit([walks(3) * 1e5], 400)
