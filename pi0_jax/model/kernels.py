"""A layer of the action expert in five kernels, for NVIDIA GPUs.

A solver step takes few tokens through all of the expert's weights, so reading these is what it should cost. Left to
XLA, each layer is some sixteen kernels, most of which move activations about. Here it is five:

    norm, queries, keys and values, rotation
    attention to the prefix and to one another
    output projection, gate, residual
    norm, gate and up, their gated product
    down projection, gate, residual

Norms are inside the products: a row's root mean square is known when its product is, and divides that. Numbers are
those of `layers.py` but for rounding; products and sums are float32. Written in Pallas for its Triton compiler.

Axis letters: b batch · t tokens · d width · f columns of a matrix · n query heads · k key/value heads · h head dim ·
s keys of the prefix.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8

from pi0_jax.config import ModelConfig
from pi0_jax.config.model import Kernel
from pi0_jax.model import target
from pi0_jax.model.attention import MASKED, watching
from pi0_jax.model.quantize import Quantized

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # builds of jaxlib without Triton, which are for machines without such GPUs
    plgpu: Any = None

EPSILON = 1e-6
ROWS = 64
"""Tokens per program of a product: what a Hopper tensor core takes."""
INTERPRET = False
"""Run as ordinary operations, on any device and in any dtype, for tests."""


Matrix = Float[Array, "_ _"] | Quantized
"""In eight bits, weights alone are rounded, and become bfloat16 as they are read."""


class Norm(NamedTuple):
    """What a norm does to the channels."""

    table: Float[Array, "r m"]
    """Of several norms, a row each: factor `[d]`, or of adaptive ones scale (zero-centred), shift and gate `[3 d]`."""
    row: int

    @property
    def operands(self) -> tuple[Array, Array]:
        """Of a kernel; the row is one, so that one kernel serves all layers."""
        return self.table, jnp.full(1, self.row, jnp.int32)


def attend_here(dtype: jnp.dtype, kernel: Kernel = "xla") -> bool:
    """Whether `attention` serves: on GPUs, in bfloat16, where no other kernel is asked for and nobody watches."""
    wanted = plgpu is not None and target.kernels() and kernel == "xla"
    return wanted and (dtype == jnp.bfloat16 or INTERPRET) and not watching()


def take(c: ModelConfig, x: Float[Array, "b t d"], cached: tuple[Array, Array]) -> bool:
    """Whether the kernels can run a layer: bfloat16, and sizes that are multiples of a tensor core's."""
    sizes = x.shape[1] % 16, cached[0].shape[1] % 64, c.head_dim % 32, c.action.width % 64, c.action.mlp_dim % 64
    return attend_here(x.dtype) and not any(sizes)


def norm_qkv(
    x: Float[Array, "b t d"],
    norm: Norm,
    w: Matrix,
    rotation: tuple[Float[Array, "b t half"], Float[Array, "b t half"]],
    kv_heads: int,
) -> Float[Array, "b t f"]:
    """Normed tokens times the matrix of queries, keys and values; queries and keys rotated."""
    (b, t, d), weights = x.shape, _weights(w)
    f = weights[0].shape[1]
    half = rotation[0].shape[-1]
    columns = math.gcd(32, half)
    rotated = f - 2 * half * kv_heads

    def norm_qkv_kernel(x_ref, norms_ref, row_ref, sin_ref, cos_ref, *refs):
        *w_refs, out_ref = refs
        program, rows = pl.program_id(0), pl.ds(pl.program_id(1) * block, block)
        per_head = half // columns
        first = program // per_head * (2 * half) + program % per_head * columns
        turned = first < rotated
        y1, y2 = _normed_product(x_ref, norms_ref, row_ref, w_refs, rows, (first, first + half), columns)
        angle = pl.ds(program % per_head * columns, columns)
        sin = jnp.where(turned, plgpu.load(sin_ref.at[rows, angle]), 0.0)
        cos = jnp.where(turned, plgpu.load(cos_ref.at[rows, angle]), 1.0)
        plgpu.store(out_ref.at[rows, pl.ds(first, columns)], (y1 * cos - y2 * sin).astype(x.dtype))
        plgpu.store(out_ref.at[rows, pl.ds(first + half, columns)], (y2 * cos + y1 * sin).astype(x.dtype))

    block = _rows(b * t)
    grid = (f // (2 * columns), b * t // block)
    angles = [y.reshape(b * t, half) for y in rotation]
    call = _call(norm_qkv_kernel, (b * t, f), x.dtype, grid, 2 * b * t * d * f)
    return call(x.reshape(b * t, d), *norm.operands, *angles, *weights).reshape(b, t, f)


def attention(
    qkv: Float[Array, "b t nkk h"],
    prefix: tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]] | None,
    mask: Int8[Array, "b t _"] | None,
    heads: int,
    scale: float = 1.0,
) -> Float[Array, "b t n h"]:
    """Attention of tokens to a prefix and to one another, without ever writing logits (arXiv 2205.14135).

    Args:
        qkv: heads of queries, of keys and of values.
        prefix: keys and values before those of the tokens.
        mask: 0 where a token (row) may not see a key, the prefix's first; None: all are seen.
        heads: number of query heads.
        scale: of the logits.
    """
    b, t, all_heads, h = qkv.shape
    k, s = (all_heads - heads) // 2, 0 if prefix is None else prefix[0].shape[1]
    tokens, width = (16 if t <= ROWS else ROWS), pl.next_power_of_2(h)
    block = 64 if width <= 128 else 32  # so that queries and two stages of keys and values fit 99 KB of shared memory

    def tile(ref, example, first, count: int, head):
        """Rows of a head, and which of them there are; columns are padded to a power of two by zeros."""
        row, column = first + jnp.arange(count) < ref.shape[1], jnp.arange(width) < h
        at = ref.at[
            example, pl.ds(first, count), head, pl.ds(0 * head, width)
        ]  # a traced 0: JAX refuses what sticks out
        if width == h and not ref.shape[1] % count:
            return plgpu.load(at), None
        return plgpu.load(at, mask=row[:, None] & column[None], other=0.0), row

    def attention_kernel(qkv_ref, *refs):
        *prefix_refs, out_ref = refs
        mask_ref = prefix_refs.pop() if mask is not None else None
        example, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * tokens
        kv = head // (heads // k)
        query, present = tile(qkv_ref, example, first, tokens, head)

        def look(sources, offset: int, i, carry):
            """Softmax and sums with one more block of keys."""
            highest, total, seen = carry
            (keys, key_head), (values, value_head) = sources
            key, there = tile(keys, example, i * block, block, key_head)
            value, _ = tile(values, example, i * block, block, value_head)
            logits = _dot(query, key.T) * scale
            if mask_ref is not None:
                at = mask_ref.at[example, pl.ds(first, tokens), pl.ds(offset + i * block, block)]
                inside = None if present is None or there is None else present[:, None] & there[None]
                logits = jnp.where(
                    plgpu.load(at, mask=inside, other=None if inside is None else 0) != 0, logits, MASKED
                )
            elif there is not None:
                logits = jnp.where(there[None], logits, MASKED)
            new = jnp.maximum(highest, jnp.max(logits, axis=1))
            weights, kept = jnp.exp(logits - new[:, None]), jnp.exp(highest - new)
            seen = seen * kept[:, None] + _dot(weights.astype(value.dtype), value)
            return new, total * kept + jnp.sum(weights, axis=1), seen

        carry = jnp.full(tokens, MASKED), jnp.zeros(tokens), jnp.zeros((tokens, width))
        if prefix_refs:
            parts = tuple((ref, kv) for ref in prefix_refs)
            carry = jax.lax.fori_loop(0, s // block, functools.partial(look, parts, 0), carry)
        parts = (qkv_ref, heads + kv), (qkv_ref, heads + k + kv)
        carry = jax.lax.fori_loop(0, pl.cdiv(t, block), functools.partial(look, parts, s), carry)
        _, total, seen = carry
        at = out_ref.at[example, pl.ds(first, tokens), head, pl.ds(0 * head, width)]
        columns = jnp.arange(width) < h
        inside = None if width == h and not t % tokens else (first + jnp.arange(tokens) < t)[:, None] & columns[None]
        plgpu.store(at, (seen / total[:, None]).astype(qkv.dtype), mask=inside)

    grid = b, heads, pl.cdiv(t, tokens)
    call = _call(
        attention_kernel,
        (b, t, heads, h),
        qkv.dtype,
        grid,
        4 * b * t * (s + t) * heads * h,
        stages=2,
        warps=4 if tokens < ROWS else 8,
    )
    return call(qkv, *(prefix or ()), *_maybe(mask))


def add_product(
    x: Float[Array, "b t d"],
    y: Float[Array, "b t f"],
    w: Matrix,
    norm: Norm,
) -> Float[Array, "b t d"]:
    """Residual plus a product, x + y·W, times the gate where the norm has one."""
    (b, t, d), f = x.shape, y.shape[-1]
    columns, block = math.gcd(16, d), _rows(b * t)

    def add_product_kernel(x_ref, y_ref, norms_ref, row_ref, w_ref, *refs):
        *scale_ref, out_ref = refs
        rows, at = pl.ds(pl.program_id(1) * block, block), pl.ds(pl.program_id(0) * columns, columns)

        def add(i, total):
            part = pl.ds(i * step, step)
            y = plgpu.load(y_ref.at[rows, part])
            return total + _dot(y, plgpu.load(w_ref.at[part, at]).astype(y.dtype))

        step = math.gcd(128, f)
        product = jax.lax.fori_loop(0, f // step, add, jnp.zeros((block, columns)))
        for ref in scale_ref:
            product *= plgpu.load(ref.at[at])[None]
        if norms_ref.shape[1] > d:
            gate = pl.ds(2 * d + pl.program_id(0) * columns, columns)
            product *= plgpu.load(norms_ref.at[row_ref[0], gate])[None].astype(jnp.float32)
        residual = plgpu.load(x_ref.at[rows, at]).astype(jnp.float32)
        plgpu.store(out_ref.at[rows, at], (residual + product).astype(x.dtype))

    call = _call(add_product_kernel, (b * t, d), x.dtype, (d // columns, b * t // block), 2 * b * t * d * f)
    return call(x.reshape(b * t, d), y.reshape(b * t, f), *norm.operands, *_weights(w)).reshape(x.shape)


def norm_geglu(
    x: Float[Array, "b t d"],
    norm: Norm,
    w: Matrix,
) -> Float[Array, "b t f"]:
    """Normed tokens times gate and up, and gelu(gate) · up of these."""
    (b, t, d), weights = x.shape, _weights(w)
    f = weights[0].shape[1] // 2
    columns, block = math.gcd(32, f), _rows(b * t)

    def norm_geglu_kernel(x_ref, norms_ref, row_ref, *refs):
        *w_refs, out_ref = refs
        first, rows = pl.program_id(0) * columns, pl.ds(pl.program_id(1) * block, block)
        gate, up = _normed_product(x_ref, norms_ref, row_ref, w_refs, rows, (first, first + f), columns)
        inner = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        plgpu.store(out_ref.at[rows, pl.ds(first, columns)], (gate * up / (1 + jnp.exp(-inner))).astype(x.dtype))

    call = _call(norm_geglu_kernel, (b * t, f), x.dtype, (f // columns, b * t // block), 4 * b * t * d * f)
    return call(x.reshape(b * t, d), *norm.operands, *weights).reshape(b, t, f)


def _normed_product(x_ref, norms_ref, row_ref, w_refs, rows, firsts, columns: int) -> list[Array]:
    """Blocks of columns of rms_norm(x)·W, float32.

    Args:
        x_ref: of all tokens.
        norms_ref, row_ref: of `Norm`.
        w_refs: of the matrix, and of its scale where it is in eight bits.
        rows: which tokens.
        firsts: first column of each block.
        columns: number of columns of a block.
    """
    d, block = x_ref.shape[1], rows.size
    adaptive = norms_ref.shape[1] > d
    step, row = math.gcd(64, d), row_ref[0]

    def add(i, carry):
        squares, totals, shifts = carry
        part = pl.ds(i * step, step)
        x = plgpu.load(x_ref.at[rows, part])
        wide = x.astype(jnp.float32)
        scale = plgpu.load(norms_ref.at[row, part]).astype(jnp.float32)
        y = (wide * (1 + scale if adaptive else scale)[None]).astype(x.dtype)
        ws = [plgpu.load(w_refs[0].at[part, pl.ds(first, columns)]).astype(x.dtype) for first in firsts]
        totals = tuple(total + _dot(y, w) for total, w in zip(totals, ws, strict=True))
        if adaptive:
            shift = plgpu.load(norms_ref.at[row, pl.ds(d + i * step, step)]).astype(jnp.float32)[:, None]
            shifts = tuple(s + jnp.sum(shift * w.astype(jnp.float32), 0) for s, w in zip(shifts, ws, strict=True))
        return squares + jnp.sum(wide * wide, axis=1), totals, shifts

    zeros = tuple(jnp.zeros((block, columns)) for _ in firsts)
    carry = jnp.zeros(block), zeros, tuple(jnp.zeros(columns) for _ in firsts)
    squares, totals, shifts = jax.lax.fori_loop(0, d // step, add, carry)
    factor = jax.lax.rsqrt(squares / d + EPSILON)[:, None]
    found = [total * factor + shift[None] for total, shift in zip(totals, shifts, strict=True)]
    for ref in w_refs[1:]:
        scales = [plgpu.load(ref.at[pl.ds(first, columns)]) for first in firsts]
        found = [y * scale[None] for y, scale in zip(found, scales, strict=True)]
    return found


def _weights(w: Matrix) -> list[Array]:
    """Operands of a kernel: a matrix, or its values in eight bits and a scale per column."""
    return [w.values, w.scale] if isinstance(w, Quantized) else [w]


def _dot(a, b):
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _rows(tokens: int) -> int:
    return math.gcd(ROWS, tokens)


def _maybe(x: Any) -> list[Any]:
    return [] if x is None else [x]


def _call(kernel, shape, dtype, grid, flop: int, stages: int = 3, warps: int = 4):
    """A kernel on a grid, in a scope that says its FLOP of products, which `pi0_jax.plan` reads."""
    call = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct(shape, dtype),
        grid=grid,
        interpret=INTERPRET,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )
    return jax.named_scope(f"flop_{flop}")(call)
