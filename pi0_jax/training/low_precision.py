"""Averages and moments in fewer bits: random rounding to bfloat16, and blocks of 8-bit codes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

BLOCK = 256
"""Numbers that share one scale."""
SMALLEST = 4096
"""Arrays with fewer numbers stay as they are: they hold norms and biases, and little memory."""
SHORT = 64
"""Blocks lie along the last axis, or along the longest one where the last is shorter than this."""


def average(ema, params, decay: float, key: PRNGKeyArray):
    """The next moving average of parameters, in the dtype of the old one.

    A bfloat16 has 8 significant bits, so a step of less than 1 / 512 of a weight is lost by rounding to nearest, and
    with a decay of 0.99 or more nearly all steps are. Rounded at random they count as often as they should.

    Args:
        ema, params: trees.
        decay: of the average.
        key: for the rounding.
    """
    leaves, structure = jax.tree.flatten(ema)
    keys = jax.random.split(key, len(leaves))

    def mix(old, new, key):
        mixed: Any = optax.incremental_update(new, old.astype(new.dtype), 1.0 - decay)
        return mixed if old.dtype == mixed.dtype else round_at_random(mixed, key)

    mixed = [mix(old, new, k) for old, new, k in zip(leaves, jax.tree.leaves(params), keys, strict=True)]
    return jax.tree.unflatten(structure, mixed)


def round_at_random(x: Float[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Float32 to one of the two bfloat16 beside it, to the nearer one more often, so that the mean is x.

    A bfloat16 is the upper half of a float32: a random lower half is added, and cut off.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(upper, jnp.bfloat16), x.astype(jnp.bfloat16))


class Coded(NamedTuple):
    """Numbers as 8-bit codes with a scale for each block."""

    codes: Any
    """int8, or uint8 for numbers that are not negative, in the shape of the numbers."""
    scales: Any
    """float32: the largest magnitude of each block; as many axes, the one along which blocks lie is shorter."""


def block_axis(shape: tuple[int, ...]) -> int | None:
    """The axis along which blocks lie; None for an array that stays as it is."""
    if math.prod(shape) < SMALLEST:
        return None
    return len(shape) - 1 if shape[-1] >= SHORT else int(np.argmax(shape))


def encode(x: Float[Array, "..."], key: PRNGKeyArray, *, signed: bool) -> Any:
    """Numbers as codes, rounded at random so that their mean is the number; small arrays stay as they are.

    Of unsigned numbers none but 0 becomes 0: as a second moment, which updates are divided by, it would make them huge.
    """
    axis = block_axis(x.shape)
    if axis is None:
        return x
    blocks = _blocks(x, axis)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    relative = jnp.abs(blocks) / jnp.where(scales == 0, 1.0, scales)[..., None]
    codes = jnp.floor(_position(relative, signed) + jax.random.uniform(key, blocks.shape))
    codes = jnp.clip(codes, 0 if signed else jnp.sign(relative), 127 if signed else 255)
    codes = (codes * jnp.sign(blocks)).astype(jnp.int8) if signed else codes.astype(jnp.uint8)
    return Coded(_joined(codes, axis, x.shape[axis]), jnp.moveaxis(scales, -1, axis))


def decode(coded: Any, *, signed: bool) -> Float[Array, "..."]:
    """The numbers that codes stand for."""
    if not isinstance(coded, Coded):
        return coded
    axis = block_axis(coded.codes.shape)
    assert axis is not None
    codes = _blocks(coded.codes, axis).astype(jnp.int32)
    values = jnp.sign(codes) * _value(jnp.abs(codes), signed) * jnp.moveaxis(coded.scales, axis, -1)[..., None]
    return _joined(values, axis, coded.codes.shape[axis])


# Dynamic quantisation (Dettmers et al. 2022, section 1.3): of a code's bits the leading one says which power of ten is
# meant, and those after it are a fraction between 0.1 and 1 of it. So there are values over seven orders of magnitude,
# most of them where numbers are large. Here a value is the upper end of its interval, so that 1 has a code; a block's
# largest number would shrink at every update otherwise.


def _value(code: Array, signed: bool) -> Array:
    """What a code is worth, between 0 and 1."""
    power = 31 - jax.lax.clz(jnp.maximum(code, 1))
    count = jnp.exp2(power.astype(jnp.float32))
    value = 10.0 ** (power - _highest(signed)) * (0.1 + 0.9 * (code - count + 1) / count)
    return jnp.where(code == 0, 0.0, value)


def _position(x: Array, signed: bool) -> Array:
    """The inverse of `_value`, linear between codes."""
    highest = _highest(signed)
    power = jnp.clip(jnp.ceil(jnp.log10(x)) + highest, 0, highest)
    count = jnp.exp2(power)
    within = count - 1 + (x * 10.0 ** (highest - power) - 0.1) / 0.9 * count
    return jnp.where(power == 0, x * 10.0**highest, within)


def _highest(signed: bool) -> int:
    return 6 if signed else 7


def _blocks(x: Array, axis: int) -> Array:
    """An array with one axis cut into blocks, the last one filled up with zeros; blocks come last."""
    x = jnp.moveaxis(x, axis, -1)
    size = min(BLOCK, x.shape[-1])
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return x.reshape(*x.shape[:-1], -1, size)


def _joined(blocks: Array, axis: int, size: int) -> Array:
    """The inverse of `_blocks`; `size` is the axis's own."""
    return jnp.moveaxis(blocks.reshape(*blocks.shape[:-2], -1)[..., :size], -1, axis)


class Adam8bitState(NamedTuple):
    """Of `scale_by_adam_8bit`."""

    count: Array
    mu: Any
    nu: Any


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2014) with both moments kept in blocks of 8-bit codes (Dettmers et al. 2022, arXiv 2110.02861).

    Each update decodes them, computes in float32 what `optax.scale_by_adam` does, and encodes the new ones. Unlike the
    paper it rounds at random: a moment that moves by less than half a code would not move at all otherwise.
    """

    def init(params) -> Adam8bitState:
        def zeros(x, signed: bool):
            return encode(jnp.zeros(x.shape, jnp.float32), jax.random.key(0), signed=signed)

        mu, nu = (jax.tree.map(lambda x: zeros(x, signed), params) for signed in (True, False))
        return Adam8bitState(jnp.int32(0), mu, nu)

    def update(updates, state: Any, params=None):
        del params
        count = state.count + 1
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), (len(leaves), 2))
        coded = (structure.flatten_up_to(tree) for tree in (state.mu, state.nu))

        def one(g, mu, nu, keys):
            mu = b1 * decode(mu, signed=True) + (1 - b1) * g
            nu = b2 * decode(nu, signed=False) + (1 - b2) * jnp.square(g)
            change = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            return change, encode(mu, keys[0], signed=True), encode(nu, keys[1], signed=False)

        changed = [one(*parts) for parts in zip(leaves, *coded, keys, strict=True)]
        change, mu, nu = (jax.tree.unflatten(structure, list(part)) for part in zip(*changed, strict=True))
        return change, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)
