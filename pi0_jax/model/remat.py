"""Rematerialisation: which results of a layer the backward pass finds stored, and which it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pi0_jax.config.model import Remat
from pi0_jax.errors import UserError

SAVED = {
    "full": (),
    "gate_up": ("attn/q", "attn/kv", "attn/attended", "attn/o", "mlp/down", "vision"),
    "matmuls": ("attn/q", "attn/kv", "attn/attended", "attn/o", "mlp/gate_up", "mlp/down", "vision"),
}
"""Names (`jax.ad_checkpoint.checkpoint_name`) of what each policy stores, beside the layer's input."""


def saveable(policy: Remat) -> Callable[..., bool] | None:
    """The `policy` of `jax.checkpoint`; None where nothing is computed again.

    Args:
        policy: "full" stores a layer's input alone; "gate_up" also the results of matrix products, but for the wide
            ones of the gated feed-forward, more than half of the bytes; "matmuls" those too; "none" everything that
            the backward pass uses, attention weights included.

    Raises:
        UserError: unknown policy.
    """
    if policy == "none":
        return None
    if policy not in SAVED:
        raise UserError(f"unknown remat {policy!r}; choose {', '.join(SAVED)} or none.")
    return jax.checkpoint_policies.save_only_these_names(*SAVED[policy])


def rematerialised(function: Callable[..., Any], policy: Remat, scanned: bool = True) -> Callable[..., Any]:
    """The function of a layer, whose backward pass computes again what the policy does not store.

    Layers that no scan keeps apart get barriers, or XLA would find that it has computed the same before, and store it.
    """
    saved = saveable(policy)
    return function if saved is None else jax.checkpoint(function, prevent_cse=not scanned, policy=saved)
