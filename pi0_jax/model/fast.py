"""FAST action tokens within a program: which code may follow, and from codes to actions (`data.fast` has the codec).

Codes stand for bytes of UTF-8, whose characters are the rounded coefficients of a cosine transform. A character may
begin in one code and end in the next, so what has been written so far is two numbers per row: how many coefficients
began, and how many bytes the last one still lacks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from pi0_jax.batch import CodecTables


class Grammar(NamedTuple):
    """What each code does to a string of codes."""

    formed: Bool[Array, "codes"]
    """Its own bytes are UTF-8, but for continuation bytes at its beginning and missing ones at its end."""
    lead: Int[Array, "codes"]
    """Continuation bytes at its beginning."""
    begun: Int[Array, "codes"]
    """Coefficients that begin in it."""
    lacking: Int[Array, "codes"]
    """Continuation bytes that its last coefficient lacks."""


class Written(NamedTuple):
    """Coefficients written so far."""

    begun: Int[Array, "b"]
    lacking: Int[Array, "b"]
    """Continuation bytes that the last one lacks."""


def grammar(tables: CodecTables) -> Grammar:
    """The grammar of a codec's codes, those out of its range left out as far as one code shows it."""
    content = tables.code_bytes
    used = jnp.arange(content.shape[1])[None] < tables.num_bytes[:, None]
    found = _characters(content, used)
    largest = jnp.max(_values(content, used, found, content.shape[1]), axis=1)
    follows, again = used & ~found.begins & (found.owner >= 0), found.begins & (found.owner > 0)
    whole = jnp.where(again[:, 1:], found.left[:, :-1] == 0, True).all(axis=1)
    formed = jnp.where(follows, found.left >= 0, True).all(axis=1) & whole & (tables.num_bytes > 0)
    last = jnp.maximum(tables.num_bytes - 1, 0)[:, None]
    return Grammar(
        formed & (largest <= tables.max_token - tables.min_token),
        jnp.sum(used & (found.owner < 0), axis=1),
        jnp.sum(found.begins, axis=1),
        jnp.take_along_axis(found.left, last, axis=1)[:, 0],
    )


def may_follow(grammar: Grammar, written: Written, total: Int[Array, ""]) -> Bool[Array, "b codes"]:
    """Codes after which a string can still become `total` whole coefficients."""
    lacking, lead = written.lacking[:, None], grammar.lead[None]
    fits = jnp.where(grammar.begun[None] > 0, lead == lacking, lead <= lacking)
    return grammar.formed[None] & fits & (written.begun[:, None] + grammar.begun[None] <= total)


def after(grammar: Grammar, written: Written, codes: Int[Array, "b"]) -> Written:
    """What has been written after one more code in each row."""
    begun = grammar.begun[codes]
    lacking = jnp.where(begun > 0, grammar.lacking[codes], written.lacking - grammar.lead[codes])
    return Written(written.begun + begun, lacking)


def decode(
    codes: Int[Array, "b n"], mask: Bool[Array, "b n"], tables: CodecTables, shape: tuple[int, int]
) -> Float[Array, "b ah ad"]:
    """Normalised, padded actions of strings of codes, as `data.fast.FastCodec.decode` gives them.

    Args:
        codes: 0 up to the number of codes.
        mask: False where there is none.
        tables: of the codec; dimensions beyond its `dims` become 0.
        shape: actions per chunk, and dimensions of the model.
    """
    (horizon, width), b, dims = shape, len(codes), tables.dims
    content, count = tables.code_bytes[codes], horizon * width
    used = (jnp.arange(content.shape[-1])[None, None] < tables.num_bytes[codes][..., None]) & mask[..., None]
    content, used = content.reshape(b, -1), used.reshape(b, -1)
    found = _characters(content, used)
    values = _values(content, used, found, count)
    there = jnp.arange(count)[None] < jnp.sum(found.begins, axis=1)[:, None]
    values = jnp.where(there, jnp.clip(values + tables.min_token, tables.min_token, tables.max_token), 0)
    # Of each frequency a slice, not an index per coefficient: see `_values`.
    padded = jnp.pad(values, ((0, 0), (0, width)))
    slices = [jax.lax.dynamic_slice_in_dim(padded, k * dims, width, axis=1) for k in range(horizon)]
    coefficients = jnp.where((jnp.arange(width) < dims)[None, None], jnp.stack(slices, axis=1), 0) / tables.scale
    return jnp.einsum("BKD,KH->BHD", coefficients, jnp.asarray(_cosines(horizon)), precision="highest")


class _Characters(NamedTuple):
    """Places of bytes in their characters."""

    begins: Bool[Array, "r n"]
    owner: Int[Array, "r n"]
    """Number of the character; -1 before the first one."""
    left: Int[Array, "r n"]
    """Continuation bytes that it lacks after this byte; negative beyond its end."""


def _characters(content: UInt8[Array, "r n"], used: Bool[Array, "r n"]) -> _Characters:
    begins = _begins(content) & used
    index = jnp.cumsum(used, axis=1) - 1  # of a byte among those that there are
    latest = jax.lax.cummax(jnp.where(begins, 8 * index + _announced(content), -8), axis=1)
    return _Characters(begins, jnp.cumsum(begins, axis=1) - 1, latest % 8 - (index - latest // 8))


def _values(
    content: UInt8[Array, "r n"], used: Bool[Array, "r n"], found: _Characters, count: int
) -> Int[Array, "r {count}"]:
    """Code points of the first characters; missing bytes are zeros, and missing characters."""
    bits = content.astype(jnp.int32)
    first = bits & jnp.array([0x7F, 0x1F, 0x0F, 0x07])[_announced(content)]
    shifted = jnp.where(found.begins, first, bits & 0x3F) << 6 * jnp.clip(found.left, 0, 3)
    taken = used & (found.owner >= 0) & (found.left >= 0)
    # No scatter: TPUs hand those to another core, and their compiler cannot print a program that does (`pi0 plan`).
    owned = taken[:, None] & (found.owner[:, None] == jnp.arange(count)[None, :, None])
    return jnp.sum(jnp.where(owned, shifted[:, None], 0), axis=2)


def _cosines(horizon: int) -> Float[np.ndarray, "k ah"]:
    """The orthonormal cosine transform (DCT-II), whose inverse is its transpose."""
    k, h = np.mgrid[:horizon, :horizon]
    table = np.cos(np.pi * (2 * h + 1) * k / (2 * horizon)) * np.sqrt(2 / horizon)
    table[0] /= np.sqrt(2)
    return table.astype(np.float32)


def _begins(content: UInt8[Array, "*b"]) -> Bool[Array, "*b"]:
    """Where a byte is no continuation byte of UTF-8."""
    return (content & 0xC0) != 0x80


def _announced(content: UInt8[Array, "*b"]) -> Int[Array, "*b"]:
    """Continuation bytes that a byte announces."""
    return sum((content >= bound).astype(jnp.int32) for bound in (0xC0, 0xE0, 0xF0))  # pyright: ignore
