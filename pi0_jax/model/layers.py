"""The layers as functions of (weights, inputs).

`gemma.py` composes them: in each layer every expert normalises its own tokens and projects them to queries, keys and
values; attention is shared, over the keys of both experts and those that `prefill` cached, as `mask.py` allows; then
every expert applies its own output projection and feed-forward. `siglip.py` stacks `encoder_block`.

Weights are dictionaries of arrays, in one of two forms: as `declare.py` makes them, for training, or folded, as
`fold.py` rewrites them for faster inference: queries, keys and values in one matrix, LoRA pairs merged, matrices
flattened and perhaps in eight bits. Functions tell the two apart by names and shapes of the leaves, and compute the
same for both.

Axis letters: b batch · t tokens · d width · n query heads · k key/value heads · h head dim · m modulation (scale, shift
and gate, 3 d) · l layers · s patches of the image encoder. `_` is any number, such as that of all keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pi0_jax.model import kernels, lora, target
from pi0_jax.model.attention import Kernel, attend
from pi0_jax.model.kernels import EPSILON
from pi0_jax.model.quantize import Quantized, quantized_dot

Weights = dict[str, Any]
"""Arrays by name, of one part of a layer."""
TPU_MANY_ROWS = 512
"""Tokens from which on folded feed-forwards run in parts on TPUs."""
TPU_ROWS = 8
"""Tokens that a product has at least on TPUs: libtpu gives those of fewer to the vector unit, which takes four times as
long as reading the weights (docs/performance.md)."""


def linear(x: Float[Array, "..."], w: Weights, dtype: jnp.dtype | None = None) -> Float[Array, "..."]:
    """x times a kernel `[*inputs, *outputs]`, plus a bias `[*outputs]`.

    Args:
        x: its last axes are the inputs, which are contracted.
        w: `kernel` and `bias`.
        dtype: of the product; None: the widest of the three.
    """
    kernel, bias = w["kernel"], w["bias"]
    dtype = jnp.result_type(x, kernel, bias) if dtype is None else dtype
    if isinstance(kernel, Quantized):
        return add(quantized_dot(x.astype(dtype), kernel), bias)
    axes = kernel.ndim - bias.ndim
    contracted = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    return add(jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (contracted, ((), ()))), bias)


def add(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """x plus a bias, which has its last axes, in the dtype of x."""
    return x + per_channel(bias.astype(x.dtype), x.ndim)


def per_channel(w: Float[Array, "..."], ndim: int) -> Float[Array, "..."]:
    """A weight with leading axes of size 1 added, up to `ndim` axes: explicit broadcasting along the last axes."""
    return w.reshape((1,) * (ndim - w.ndim) + w.shape)


def dot(name: str, x: Float[Array, "b t *d"], w: Weights, scale: float = 1.0) -> Float[Array, "b t *f"]:
    """Tokens times a weight of an expert: x·W, and where it has a LoRA pair A, B, x·W + scale·(x·A)·B.

    Args:
        name: of the weight within its layer, such as "attn/q" (`lora.EINSUMS`). The result is tagged with it, so that
            rematerialisation can choose to keep it.
        x: tokens.
        w: weights of the attention or of the feed-forward. A folded weight is a matrix and gives `[b t f]`; any other
            gives its own output axes, such as `[b t n h]`.
        scale: of the LoRA pair's product.
    """
    return checkpoint_name(with_enough_rows(lambda x: _dot(name, x, w, scale), x), name)


def with_enough_rows(
    product: Callable[[Float[Array, "_b _t *d"]], Float[Array, "_b _t *f"]], x: Float[Array, "b t *d"]
) -> Float[Array, "b t *f"]:
    """A product of tokens, on TPUs of at least `TPU_ROWS`: zeros are added, and what comes of them is dropped."""
    b, t = x.shape[:2]
    if target.platform() != "tpu" or b * t >= TPU_ROWS:
        return product(x)
    more = jnp.zeros((1, TPU_ROWS - b * t, *x.shape[2:]), x.dtype)
    result = product(jnp.concatenate([x.reshape(1, b * t, *x.shape[2:]), more], axis=1))[:, : b * t]
    return result.reshape(b, t, *result.shape[2:])


def _dot(name: str, x: Float[Array, "b t *d"], w: Weights, scale: float) -> Float[Array, "b t *f"]:
    leaf = name.split("/")[1]
    weight = w[leaf]
    if isinstance(weight, Quantized):
        return quantized_dot(x.reshape(*x.shape[:2], -1), weight)
    if weight.ndim == 2:
        result = x.reshape(*x.shape[:2], -1) @ weight.astype(x.dtype)
    else:
        result = jnp.einsum(lora.EINSUMS[name].whole, x, weight.astype(x.dtype))
    if f"{leaf}_lora_a" in w:
        a, b = (w[f"{leaf}_lora_{side}"] for side in "ab")
        result += scale * lora.product(name, x, a, b)
    return result


def layer_norm(x: Float[Array, "... d"], w: Weights | None = None) -> Float[Array, "... d"]:
    """LayerNorm with statistics in float32; without w, no scale and bias."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.mean(jnp.square(x32), axis=-1, keepdims=True) - jnp.square(mean))
    factor = jax.lax.rsqrt(variance + EPSILON)
    y = (x32 - mean) * (factor if w is None else factor * per_channel(w["scale"], x.ndim))
    return (y if w is None else add(y, w["bias"])).astype(x.dtype)


def rms_norm(
    x: Float[Array, "b t d"], w: Weights | None = None, modulation: Float[Array, "*time m"] | None = None
) -> tuple[Float[Array, "b t d"], Float[Array, "#b _ d"] | None]:
    """Root-mean-square norm (arXiv 1910.07467) with Gemma's zero-centred scale: x / rms(x) · (1 + scale).

    Adaptive, as in π0.5's action expert: scale, shift and a gate for the residual branch come from the flow time
    (adaLN-Zero, Peebles and Xie 2022, arXiv 2212.09748). Statistics are float32.

    Args:
        x: tokens.
        w: `scale`; not read where there is a modulation.
        modulation: scale, shift and gate side by side: `[m]` for all tokens, `[b m]` per example, or `[b g m]`, where
            each of the g serves t / g successive tokens: those of a draw, or one token.

    Returns:
        The normalised tokens, and the gate, by which the branch's output is multiplied (None unless adaptive).
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPSILON)
    if modulation is None:
        if w is not None:
            normed *= per_channel(w["factor"] if "factor" in w else 1 + w["scale"], x.ndim)
        return normed.astype(x.dtype), None
    modulation = per_token(modulation)
    if modulation.shape[1] > 1:
        modulation = jnp.repeat(modulation, x.shape[1] // modulation.shape[1], axis=1)
    scale, shift, gate = jnp.split(modulation, 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate


def per_token(x: Float[Array, "*time m"]) -> Float[Array, "#b #t m"]:
    """`[m]`, `[b m]` or `[b t m]` with all three axes, absent ones of size 1."""
    return x[None, None] if x.ndim == 1 else x[:, None] if x.ndim == 2 else x


Rotation = tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]
"""Sine and cosine of the rotary angles of each token, for half of a head's dimensions."""


def rotation(positions: Int[Array, "b t"], head_dim: int, base: float = 10_000.0) -> Rotation:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), float32."""
    frequency = base ** (-2.0 * jnp.arange(head_dim // 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: Float[Array, "b t n h"], by: Rotation) -> Float[Array, "b t n h"]:
    """Rotates the first half of each head against the second (not interleaved pairs), in float32; keeps the dtype."""
    sin, cos = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_folded(x: Float[Array, "b t n h"], by: Rotation) -> Float[Array, "b t n h"]:
    """`rotate` for inference. On TPUs halves change places in a product with a constant matrix, which is exact: they
    are slow at moving parts of rows, and what is added and multiplied goes with the product."""
    if target.platform() != "tpu":
        return rotate(x, by)
    half = np.eye(x.shape[-1] // 2)
    swap = jnp.asarray(np.block([[0 * half, half], [-half, 0 * half]]), x.dtype)
    highest: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    sin, cos = (jnp.concatenate([y, y], axis=-1) for y in by)
    return (x.astype(jnp.float32) * cos + jnp.einsum("BTNH,HK->BTNK", x, swap, **highest) * sin).astype(x.dtype)


KeysValues = tuple[Float[Array, "b _ k h"], Float[Array, "b _ k h"]]
"""Rotated keys, and values, of one layer."""


def keys_values(x: Float[Array, "b t d"], w: Weights, by: Rotation, kv_heads: int, lora_scale: float) -> KeysValues:
    """Keys and values of tokens that need no queries: in the last layer, the prefix is only attended to."""
    kv = dot("attn/kv", x, w, lora_scale).reshape(*x.shape[:2], 2, kv_heads, -1)
    return _by_heads(rotate(kv[:, :, 0], by), "kv_heads"), _by_heads(kv[:, :, 1], "kv_heads")


def queries_keys_values(
    x: Float[Array, "b t d"], w: Weights, by: Rotation, heads: tuple[int, int], lora_scale: float
) -> tuple[Float[Array, "b t n h"], KeysValues]:
    """Rotated queries, and keys and values. Queries are to be scaled by 1 / sqrt(head dim): folded weights include
    that factor, otherwise `attend` applies it.

    Args:
        x: normalised tokens.
        w: weights of the attention.
        by: rotation of each token.
        heads: number of query heads and of key/value heads.
        lora_scale: `ExpertConfig.lora_scale`.
    """
    (b, t, _), (n, k) = x.shape, heads
    if "qkv" not in w:
        query = rotate(dot("attn/q", x, w, lora_scale), by)
        return _by_heads(query, "heads"), keys_values(x, w, by, k, lora_scale)
    qkv = dot("attn/qkv", x, w).reshape(b, t, n + 2 * k, -1)
    query, key = (rotate_folded(qkv[:, :, part], by) for part in (slice(n), slice(n, n + k)))
    return query, (key, qkv[:, :, n + k :])


def rotated_qkv(
    x: Float[Array, "b t d"], w: Weights, by: Rotation, heads: tuple[int, int]
) -> Float[Array, "b t nkk h"]:
    """`queries_keys_values` of folded weights in one array."""
    (b, t, _), (n, k) = x.shape, heads
    qkv = dot("attn/qkv", x, w).reshape(b, t, n + 2 * k, -1)
    return jnp.concatenate([rotate(qkv[:, :, : n + k], by), qkv[:, :, n + k :]], axis=2)


def gated_mlp(x: Float[Array, "b t d"], w: Weights) -> Float[Array, "b t d"]:
    """GeGLU feed-forward (arXiv 2002.05202), tanh-approximate GELU. Its LoRA has no scale, as in openpi."""
    weight = w["gate_up"]
    if type(weight) is tuple or getattr(weight, "ndim", 2) == 3:
        # A product each: in one, GPUs would copy the pair of matrices, and its gradient, into another layout.
        halves = ({name: leaf[i] for name, leaf in w.items() if name.startswith("gate_up")} for i in range(2))
        gate, up = (with_logical_constraint(dot("mlp/gate_up", x, half), ("batch", None, "mlp")) for half in halves)
    elif target.platform() == "tpu" and isinstance(weight, jax.Array) and x.shape[0] * x.shape[1] >= TPU_MANY_ROWS:
        return _gated_mlp_in_parts(x, weight, w["down"])
    else:  # folded; two slices, as a reshape would make TPUs copy the matrix into another layout
        gate, up = jnp.split(dot("mlp/gate_up", x, w), 2, axis=-1)
    return dot("mlp/down", gated(gate, up), w)


def _gated_mlp_in_parts(
    x: Float[Array, "b t d"], gate_up: Float[Array, "d ff"], down: Float[Array, "f d"], parts: int = 2
) -> Float[Array, "b t d"]:
    """`gated_mlp` of folded weights, a part of the hidden channels after another: halves of those of many tokens find
    room in a TPU's VMEM."""
    f, total = down.shape[0], jnp.zeros((), jnp.float32)
    for i in range(parts):
        part = slice(i * f // parts, (i + 1) * f // parts)
        gate, up = (x @ half[:, part].astype(x.dtype) for half in (gate_up[:, :f], gate_up[:, f:]))
        product = jnp.matmul(gated(gate, up), down[part].astype(x.dtype), preferred_element_type=jnp.float32)
        total = product if i == 0 else total + product
    return total.astype(x.dtype)


@jax.custom_jvp
def gated(gate: Float[Array, "*b f"], up: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """gelu(gate) · up. The backward pass needs nothing but the two."""
    return jax.nn.gelu(gate) * up


@gated.defjvp
def _gated_jvp(primals, tangents):
    (gate, up), (dgate, dup) = primals, tangents
    activation, slope = jax.jvp(jax.nn.gelu, (gate,), (jnp.ones_like(gate),))
    return activation * up, slope * up * dgate + activation * dup


def encoder_block(
    x: Float[Array, "b s d"], w: Weights, num_heads: int, kernel: Kernel = "xla"
) -> Float[Array, "b s d"]:
    """Pre-norm transformer block of the image encoder: multi-head attention, then an MLP."""
    b, s, d = x.shape
    split = (num_heads, d // num_heads)

    def project(y, name: str):
        return checkpoint_name(linear(y, w[name], x.dtype), "vision")

    y = layer_norm(x, w["attn_norm"])
    if "qkv" in w:
        qkv = project(y, "qkv").reshape(b, s, 3, *split)
        if kernels.attend_here(x.dtype, kernel):
            y = kernels.attention(qkv.reshape(b, s, -1, split[1]), None, None, num_heads, split[1] ** -0.5)
        else:
            y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], kernel=kernel)
        y = y.reshape(x.shape)
    else:
        query, key, value = (_by_heads(project(y, name), "heads") for name in ("query", "key", "value"))
        y = attend(query, key, value, kernel=kernel)
    x += project(checkpoint_name(y, "vision"), "out")
    y = project(layer_norm(x, w["mlp_norm"]), "mlp_in")
    if "qkv" in w and target.platform() == "tpu":
        y = jax.lax.optimization_barrier(y)  # TPUs would compute this product anew for each block of the next one
    y = with_logical_constraint(y, ("batch", None, "mlp"))
    x += linear(jax.nn.gelu(y), w["mlp_out"], x.dtype)
    return with_logical_constraint(x, ("batch", None, None))


def _by_heads(x: Float[Array, "b t n h"], axis: str) -> Float[Array, "b t n h"]:
    return with_logical_constraint(x, ("batch", None, axis, None))


Record = Callable[[str, Float[Array, "l b t d"]], None]
"""Takes activations for analysis: record(path of the layers' parameters, residual stream after every layer)."""


def through(layer: Callable[[Any, Any], tuple[Any, Any]], x: Any, weights: Any) -> tuple[Any, Any]:
    """Runs x through layers: a scan over stacked weights, or a list of weights one after another.

    Args:
        layer: (x, weights of a layer) -> (x, output).
        x: what the first layer gets.
        weights: of all layers.

    Returns:
        What the last layer gave, and the outputs of all layers in the same form as the weights.
    """
    if not isinstance(weights, list):
        return jax.lax.scan(layer, x, weights)
    outputs = []
    for w in weights:
        x, output = layer(x, w)
        outputs.append(output)
    return x, outputs


def cast_matrices(weights: Any, dtype: jnp.dtype) -> Any:
    """Stacked weights with their matrices in the dtype that layers multiply in; lists of layers as they are.

    Outside of a scan they are cast once per update, and their gradients are stacked in the dtype that they come in.
    """
    if isinstance(weights, list):
        return weights
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 2 else x, weights)


def unstacked(weights: Any, dtype: jnp.dtype) -> list[Any]:
    """Stacked weights as a list of layers, cast by `cast_matrices`; their gradients are joined to a stack again."""
    leaves, structure = jax.tree.flatten(cast_matrices(weights, dtype))
    parts = [apart(x) for x in leaves]
    return [structure.unflatten(layer) for layer in zip(*parts, strict=True)]


def apart(x: Float[Array, "n ..."]) -> tuple[Float[Array, "..."], ...]:
    """The n arrays along the first axis, whose gradients are concatenated, not added up."""
    return tuple(part[0] for part in jax.lax.split(x, [1] * len(x)))


def stacked(outputs: Any) -> Any:
    """Outputs of `through` with a leading axis over layers."""
    return jax.tree.map(lambda *x: jnp.stack(x), *outputs) if isinstance(outputs, list) else outputs
