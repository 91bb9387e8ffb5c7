"""Decoding of FAST tokens within a program, against the codec's own in numpy; and which code may follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import CodecTables
from pi0_jax.data.fast import FastCodec, bytes_to_values
from pi0_jax.model import fast

AHEAD, DIMS, WIDTH = 10, 3, 5


def tables_of(codec: FastCodec, dims: int = DIMS) -> CodecTables:
    values = codec.code_bytes, codec.num_bytes, codec.min_token, codec.max_token, np.float32(codec.scale), dims
    return CodecTables(*map(jnp.asarray, (*values, [5, 6, 7], 9, 1)))


@pytest.fixture(scope="module")
def codec() -> FastCodec:
    pytest.importorskip("tokenizers")
    return FastCodec.fit([chunks(200)], 400)


def chunks(count: int) -> np.ndarray:
    return 0.3 * np.cumsum(np.random.default_rng(0).normal(size=(count, AHEAD, DIMS)), axis=1)


def test_decoding_is_the_codecs_own_for_chunks_and_for_any_other_string(codec):
    rng = np.random.default_rng(1)
    strings = codec.encode(chunks(20)) + [rng.integers(0, 400, rng.integers(1, 60)).tolist() for _ in range(50)]
    most = max(map(len, strings))
    codes = np.array([[*string, *[0] * (most - len(string))] for string in strings])
    mask = np.arange(most) < np.array([[len(string)] for string in strings])
    decode = jax.jit(lambda codes, mask: fast.decode(codes, mask, tables_of(codec), (AHEAD, WIDTH)))
    found = decode(codes.astype(np.int32), mask)
    expected, valid = codec.decode(strings, AHEAD, DIMS)
    assert 20 <= valid.sum() < 70
    np.testing.assert_allclose(found[..., :DIMS], expected, atol=1e-5)
    np.testing.assert_array_equal(found[..., DIMS:], 0)


def test_codes_that_may_follow_make_a_whole_chunk_and_never_more(codec):
    grammar, total, rows = fast.grammar(tables_of(codec)), AHEAD * DIMS, 8

    @jax.jit
    def step(written, key):
        allowed = fast.may_follow(grammar, written, jnp.int32(total))
        code = jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf))
        whole = (written.begun == total) & (written.lacking == 0)
        after = fast.after(grammar, written, code)
        return jax.tree.map(lambda new, old: jnp.where(whole, old, new), after, written), code, whole, allowed.any(1)

    written, strings = fast.Written(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32)), [[] for _ in range(rows)]
    whole = np.zeros(rows, bool)
    for number in range(3 * total):
        written, codes, whole, possible = step(written, jax.random.key(number))
        for string, code, ends, any_code in zip(strings, codes, whole, possible, strict=True):
            assert ends or any_code
            string.extend([] if ends else [int(code)])
    assert whole.all()
    assert [codec.count_values(string) for string in strings] == [total] * rows
    content = [b"".join(bytes(codec.code_bytes[c, : codec.num_bytes[c]]) for c in string) for string in strings]
    assert all(bytes_to_values(np.frombuffer(each, np.uint8))[1] for each in content)  # well-formed
