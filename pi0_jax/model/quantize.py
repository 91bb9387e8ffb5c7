"""Matrices in eight bits, for inference."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Bits = Literal["int8", "fp8"]


class Quantized(NamedTuple):
    """A matrix in eight bits: `values` · `scale`."""

    values: Any
    """`[d f]`, int8 or float8_e4m3fn."""
    scale: Any
    """`[f]`, float32: one for each output."""


@functools.partial(jax.jit, static_argnums=1)
def quantize_matrix(w: Float[Array, "d f"], bits: Bits) -> Quantized:
    """Rounds a matrix to eight bits, each output with the scale that its largest weight needs."""
    dtype, most = (jnp.int8, 127.0) if bits == "int8" else (jnp.float8_e4m3fn, 448.0)
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(w), axis=-2), 1e-30) / most
    values = w / scale[..., None, :]
    return Quantized((jnp.round(values) if bits == "int8" else values).astype(dtype), scale)


def quantized_dot(x: Float[Array, "b t d"], w: Quantized) -> Float[Array, "b t f"]:
    """Tokens times a matrix in eight bits. With fp8 the tokens are rounded, too."""
    if w.values.dtype == jnp.int8:
        return ((x @ w.values.astype(x.dtype)) * w.scale[None, None]).astype(x.dtype)
    # A scale for each token: what else is in the batch changes nothing.
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32), 1e-30) / 448.0
    rounded = (x / scale).astype(w.values.dtype).astype(x.dtype)
    return ((rounded @ w.values.astype(x.dtype)) * (scale * w.scale[None, None])).astype(x.dtype)


def quantize(params: dict[str, Any], bits: Bits) -> dict[str, Any]:
    """Folded parameters with the matrices of all layers, and the image projector's, in eight bits.

    Args:
        params: of `fold`.
        bits: int8, or float8 (e4m3), whose products also round the tokens.
    """

    def leaf(path: tuple[Any, ...], w: Array) -> Any:
        names = [str(getattr(entry, "key", "")) for entry in path]
        layered = ("layers" in names and "modulation" not in names) or names[0] == "image_projector"
        return quantize_matrix(w, bits) if layered and w.ndim == 2 else w

    return jax.tree.map_with_path(leaf, params)
