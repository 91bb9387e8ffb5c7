"""Attention. Axis letters: see `pi0_jax.batch`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pi0_jax.config.model import Kernel
from pi0_jax.model import target

MASKED = -2.3819763e38
"""Stands for minus infinity in masked logits; the reference implementations' value, finite in bfloat16."""

_log = logging.getLogger(__name__)
_watching: list[list[jax.Array]] = []


@contextlib.contextmanager
def watch_attention() -> Iterator[list[jax.Array]]:
    """Gives a list to which each `attend` called within appends its weights, `[b k t·g s]`: t queries of g heads.

    For networks whose layers are not scanned, as those of folded parameters: what a scan traces cannot leave it. Fused
    kernels keep no weights.
    """
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def watching() -> bool:
    """Whether weights are asked for."""
    return bool(_watching)


def attend(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"] | None = None,
    scale: float | None = None,
    kernel: Kernel = "xla",
) -> Float[Array, "b t n h"]:
    """Grouped-query attention. Logits and softmax are float32, whatever the dtype of the inputs.

    Args:
        query: n heads, a multiple of the k key/value heads.
        key, value: k heads, each serving n / k query heads.
        mask: True where a query may look; None lets every query see every key.
        scale: of the queries; None: h^-1/2.
        kernel: `ModelConfig.attention`.
    """
    b, t, n, h = query.shape
    k = key.shape[2]
    # A fused kernel is for many queries: the chunk's few are odd in number, which cuDNN's backward pass refuses.
    if kernel == "cudnn" and t == key.shape[1] and why_not_fused(query.dtype) is None:
        return fused(query, key, value, mask, scale)
    # The queries that share a key head become rows of one matrix product, those of a token one after another: where
    # all share one, as in Gemma, that is the order they have.
    query = query if scale == 1 else query * (h**-0.5 if scale is None else scale)
    grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 1, 3, 4).reshape(b, k, -1, h)
    on_tpu = n > k and target.platform() == "tpu" and not _watching  # heads of images are too small to gain
    attended = (_attended_on_tpu if on_tpu else _attended)(grouped, key, value, mask)
    return attended.reshape(b, k, t, n // k, h).transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _attended(
    query: Float[Array, "b k r h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"] | None,
) -> Float[Array, "b k r h"]:
    """Values added up by `attention_weights`, whose arguments these are."""
    weights = attention_weights(query, key, mask).astype(value.dtype)
    if _watching:
        _watching[-1].append(weights)
    return jnp.einsum("BKTS,BSKH->BKTH", weights, value)


@jax.custom_jvp
def _attended_on_tpu(
    query: Float[Array, "b k r h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    mask: Bool[Array, "b t s"] | None,
) -> Float[Array, "b k r h"]:
    """`_attended` without a pass over the logits: what is before and after the products goes with these.

    Weights are divided by their sum when values have been added up, and the sum comes from a product with ones, once
    for each of a head's dimensions. Derivatives are those of `_attended`.
    """
    logits = _logits(query, key, mask)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(value.dtype)
    attended = jnp.einsum("BKRS,BSKH->BKRH", weights, value, preferred_element_type=jnp.float32)
    ones = jnp.ones((value.shape[1], value.shape[3]), value.dtype)
    total = jnp.einsum("BKRS,SH->BKRH", weights, ones, preferred_element_type=jnp.float32)
    return (attended / total).astype(value.dtype)


@_attended_on_tpu.defjvp
def _attended_on_tpu_jvp(primals, tangents):
    (query, key, value, mask), changes = primals, tuple(tangents[:3])
    return jax.jvp(lambda *inputs: _attended(*inputs, mask=mask), (query, key, value), changes)


@jax.custom_jvp
def attention_weights(
    query: Float[Array, "b k r h"], key: Float[Array, "b s k h"], mask: Bool[Array, "b t s"] | None
) -> Float[Array, "b k r s"]:
    """Softmax over keys of the products of queries and keys, in float32, then in the dtype of the queries.

    The backward pass reads these weights, and no logits, and multiplies in the dtype of the queries: as JAX derives it
    it would read logits, and multiply in float32.

    Args:
        query: scaled; rows are those of each of t tokens, one for each head that shares the key head.
        key: of each key head.
        mask: as in `attend`.
    """
    logits = _logits(query, key, mask)
    return jax.nn.softmax(logits, axis=-1).astype(query.dtype).reshape(*logits.shape[:2], -1, logits.shape[-1])


def _logits(query, key, mask) -> Float[Array, "b k *r s"]:
    """Products of queries and keys, masked, in float32; where there is a mask, tokens may have an axis of their own."""
    logits = jnp.einsum("BKRH,BSKH->BKRS", query, key, preferred_element_type=jnp.float32)
    if mask is None:
        return logits
    if target.platform() == "tpu":
        # With an axis of heads, TPUs would not have room to fetch the next product's weights meanwhile.
        return jnp.where(jnp.repeat(mask, logits.shape[2] // mask.shape[1], axis=1)[:, None], logits, MASKED)
    # Heads have an axis of their own here, so that XLA fuses the mask as it is into the softmax.
    by_head = logits.reshape(*logits.shape[:2], mask.shape[1], -1, logits.shape[-1])
    return jnp.where(mask[:, None, :, None], by_head, MASKED)


@attention_weights.defjvp
def _attention_weights_jvp(primals, tangents):
    (query, key, mask), (dquery, dkey, _) = primals, tangents
    weights = attention_weights(query, key, mask)
    change = jnp.einsum("BKRH,BSKH->BKRS", dquery, key) + jnp.einsum("BKRH,BSKH->BKRS", query, dkey)
    wide, change = weights.astype(jnp.float32), change.astype(jnp.float32)
    return weights, (wide * (change - jnp.sum(wide * change, axis=-1, keepdims=True))).astype(weights.dtype)


def why_not_fused(dtype) -> str | None:
    """Why cuDNN's kernel cannot serve here, where it cannot."""
    if jax.default_backend() != "gpu":
        return f"attention is XLA's: cudnn needs an NVIDIA GPU, and this is {jax.default_backend()}"
    return None if dtype == jnp.bfloat16 else f"attention is XLA's: cudnn takes bfloat16, and the model is {dtype}"


def report_kernel(kernel: Kernel, dtype) -> None:
    """Warns where a kernel that was asked for cannot serve."""
    if kernel == "cudnn" and (reason := why_not_fused(dtype)):
        _log.warning("%s", reason)


def fused(query, key, value, mask=None, scale: float | None = None, implementation: Kernel = "cudnn"):
    """`attend` by one kernel, which keeps no logits.

    The mask is given as a bias, since cuDNN's wrapper has refused the shape of masks alone (jax issue 28974).

    Raises:
        NotImplementedError: dtype or shape that the kernel does not take.
    """
    bias = None if mask is None else jnp.where(mask, 0.0, 0.5 * jnp.finfo(query.dtype).min).astype(query.dtype)[:, None]
    return jax.nn.dot_product_attention(query, key, value, bias, scale=scale, implementation=implementation)
