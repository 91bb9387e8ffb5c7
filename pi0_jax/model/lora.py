"""Low-rank additions to a weight (Hu et al. 2021, arXiv 2106.09685), in the form of openpi's.

    query, key, value  w + scale · a b    one pair a head; scale = alpha / rank, `ExpertConfig.lora_scale`
    output             w + scale · a Σb   heads are summed in the middle: a of each head meets the sum of all heads' b
    feed-forward       w + a b            no scale

a and b of a weight stand beside it as `<name>_lora_a` and `<name>_lora_b`. They stay separate in training; `merge` adds
them to the weight, after which the model has none. Axis letters: see `pi0_jax.batch`, and R for the rank, F for the
feed-forward's width, C for a pair of weights in one array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pi0_jax.model.norm import named

Pair = tuple[Any, Any]

EINSUMS = {
    "attn/q": ("BTD,DNH->BTNH", "BTD,DNR->BTNR", "BTNR,NRH->BTNH", "DNR,NRH->DNH"),
    "attn/kv": ("BTD,CDKH->BTCKH", "BTD,CDKR->BTCKR", "BTCKR,CKRH->BTCKH", "CDKR,CKRH->CDKH"),
    "attn/o": ("BTNH,NHD->BTD", "BTNH,NHR->BTR", "BTR,MRD->BTD", "NHR,MRD->NHD"),
    "mlp/gate_up": ("BTD,CDF->BTCF", "BTD,CDR->BTCR", "BTCR,CRF->BTCF", "CDR,CRF->CDF"),
    "mlp/down": ("BTF,FD->BTD", "BTF,FR->BTR", "BTR,RD->BTD", "FR,RD->FD"),
}
"""Weight to: tokens by w; tokens by a; that by b; and a by b."""


def declare(param: Callable[..., Any], name: str, shapes: Pair, axes: Pair) -> Pair:
    """Declares a weight's pair: a from a narrow normal distribution, b zero, so that training starts from w.

    Args:
        param: the module's `param`.
        name: of the weight.
        shapes, axes: of a and of b; the axes are logical names.
    """
    return (
        param(f"{name}_lora_a", named(nn.initializers.normal(0.01), axes[0]), shapes[0], jnp.float32),
        param(f"{name}_lora_b", named(nn.initializers.zeros_init(), axes[1]), shapes[1], jnp.float32),
    )


def apply(name: str, x: Float[Array, "..."], w: Float[Array, "..."], pair: Pair | None, scale: float = 1.0):
    """Multiplies tokens by a weight, and by its adapters without adding the two up.

    Args:
        name: of the weight, as in `EINSUMS`; the result carries it for `remat`.
        x: tokens.
        w: the weight.
        pair: its adapters; None for none.
        scale: of the adapters' result.
    """
    whole, first, second, _ = EINSUMS[name]
    result = jnp.einsum(whole, x, w.astype(x.dtype))
    if pair is not None:
        a, b = (part.astype(x.dtype) for part in pair)
        result += scale * jnp.einsum(second, jnp.einsum(first, x, a), b)
    return checkpoint_name(result, name)


def merge(name: str, w: Any, a: Any, b: Any, scale: float, xp: Any = np) -> Any:
    """The weight that does what a weight and its adapters do, computed in float32 and rounded to the widest dtype of
    the three: a frozen weight in bfloat16 could not hold what adapters in float32 learned.

    Args:
        name: of the weight, as in `EINSUMS`.
        w, a, b: the weight and its pair, of one layer.
        scale: `ExpertConfig.lora_scale`; not used for feed-forward weights.
        xp: what the arrays are of, numpy or jax.numpy.
    """
    product = xp.einsum(EINSUMS[name][3], a.astype(np.float32), b.astype(np.float32), optimize=True)
    factor = np.float32(scale if name.startswith("attn/") else 1.0)
    return (w.astype(np.float32) + factor * product).astype(np.result_type(w.dtype, a.dtype, b.dtype))
