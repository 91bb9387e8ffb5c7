"""Low-rank additions to a weight (Hu et al. 2021, arXiv 2106.09685), in the form of openpi's.

    query, key, value  w + scale · a b    one pair a head; scale = alpha / rank, `ExpertConfig.lora_scale`
    output             w + scale · a Σb   heads are summed in the middle: a of each head meets the sum of all heads' b
    feed-forward       w + a b            no scale

a and b of a weight stand beside it as `<name>_lora_a` and `<name>_lora_b`. They stay separate in training; `merge` adds
them to the weight, after which the model has none. Axis letters: see `pi0_jax.batch`, and R for the rank, F for the
feed-forward's width, C for a pair of weights in one array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pi0_jax.model.declare import Leaf, Spec

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]


class Einsums(NamedTuple):
    """The products that a weight w and its pair take part in."""

    whole: str
    """Tokens by w."""
    first: str
    """Tokens by a."""
    second: str
    """That by b."""
    pair: str
    """a by b."""


EINSUMS = {
    "attn/q": Einsums("BTD,DNH->BTNH", "BTD,DNR->BTNR", "BTNR,NRH->BTNH", "DNR,NRH->DNH"),
    "attn/kv": Einsums("BTD,CDKH->BTCKH", "BTD,CDKR->BTCKR", "BTCKR,CKRH->BTCKH", "CDKR,CKRH->CDKH"),
    "attn/o": Einsums("BTNH,NHD->BTD", "BTNH,NHR->BTR", "BTR,MRD->BTD", "NHR,MRD->NHD"),
    # "..." is the axis of the pair, which one of the two does not have.
    "mlp/gate_up": Einsums("BTD,...DF->BT...F", "BTD,...DR->BT...R", "BT...R,...RF->BT...F", "...DR,...RF->...DF"),
    "mlp/down": Einsums("BTF,FD->BTD", "BTF,FR->BTR", "BTR,RD->BTD", "FR,RD->FD"),
}


def spec(name: str, shapes: tuple[Shape, Shape], axes: tuple[Axes, Axes]) -> Spec:
    """The pair of a weight: a from a narrow normal distribution, b zero, so that training starts from w."""
    return {
        f"{name}_lora_a": Leaf(shapes[0], axes[0], nn.initializers.normal(0.01)),
        f"{name}_lora_b": Leaf(shapes[1], axes[1], nn.initializers.zeros_init()),
    }


def product(name: str, x: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Tokens times a pair, in the tokens' dtype."""
    einsums = EINSUMS[name]
    return jnp.einsum(einsums.second, jnp.einsum(einsums.first, x, a.astype(x.dtype)), b.astype(x.dtype))


def merge(name: str, w: Any, a: Any, b: Any, scale: float, xp: Any = np) -> Any:
    """The weight that does what a weight and its adapters do, computed in float32 and rounded to the widest dtype of
    the three: a frozen weight in bfloat16 could not hold what adapters in float32 learned.

    Args:
        name: of the weight, as in `EINSUMS`.
        w, a, b: the weight and its pair, of one layer.
        scale: `ExpertConfig.lora_scale`; not used for feed-forward weights.
        xp: what the arrays are of, numpy or jax.numpy.
    """
    product = xp.einsum(EINSUMS[name].pair, a.astype(np.float32), b.astype(np.float32), optimize=True)
    factor = np.float32(scale if name.startswith("attn/") else 1.0)
    return (w.astype(np.float32) + factor * product).astype(np.result_type(w.dtype, a.dtype, b.dtype))
