"""Which token may attend to which, and where in the sequence each one stands.

Three vectors say it, one entry per token (after big_vision's prefix-LM masks):

    mask_ar   1 where a token begins a block: the tokens before it do not see it. Blocks see themselves and all
              blocks before them, so the block of a token is the cumulative sum.
    group     0 for tokens that all later ones see; tokens of any other group are seen by that group alone.
    valid     False at absent cameras and padding, which nobody sees and which have no position.

    images, prompt   one block, both ways            mask_ar  0 0 0 0    1 1 1 1
                                                                         1 1 1 1 ...

    causal text      a block per token               mask_ar  0 0 1 1    1 1 0 0
    after a prefix of two                                                1 1 0 0
                                                                         1 1 1 0
                                                                         1 1 1 1

    prefix, state,   draws do not see one another    mask_ar  0 1 1 0 1 0    1 . . . . .
    two draws of                                     group    0 0 1 1 2 2    1 1 . . . .
    two actions                                                              1 1 1 1 . .
                                                                             1 1 1 1 . .
                                                                             1 1 . . 1 1
                                                                             1 1 . . 1 1

Causal draws are blocks of one token within each group. Axis letters: see `pi0_jax.batch`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def may_attend(mask_ar: Int[np.ndarray, "t"], group: Int[np.ndarray, "t"]) -> Bool[np.ndarray, "t t"]:
    """True where the row's token may see the column's, both valid."""
    block = np.cumsum(mask_ar)
    return (block[None] <= block[:, None]) & ((group[None] == 0) | (group[None] == group[:, None]))


def attention_mask(
    mask_ar: Int[np.ndarray, "t"],
    group: Int[np.ndarray, "t"],
    valid: Bool[Array, "b t"],
    cached: Bool[Array, "b s"] | None = None,
) -> Bool[Array, "b t _"]:
    """True where a token (row) may see a key: the valid cached ones, which come first, then the tokens themselves."""
    own = jnp.asarray(may_attend(mask_ar, group))[None] & valid[:, None]
    if cached is None:
        return own
    b, t, _ = own.shape
    return jnp.concatenate([jnp.broadcast_to(cached[:, None], (b, t, cached.shape[1])), own], axis=-1)


def positions(
    group: Int[np.ndarray, "t"], valid: Bool[Array, "b t"], start: Int[Array, "b"] | int = 0
) -> Int[Array, "b t"]:
    """Number of valid tokens that come before each one and are of its own group or of group 0.

    So all draws begin at the same position. The tokens of a group other than 0 are contiguous.
    """
    index = np.arange(len(group))
    first = np.array([np.argmax(group == g) for g in group])
    shared = jnp.cumsum(valid & (group == 0)[None], axis=1, dtype=jnp.int32)
    position = shared - 1
    if (group > 0).any():
        counted = jnp.pad(jnp.cumsum(valid, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
        own = counted[:, index + 1] - counted[:, first]
        position += jnp.where((group > 0)[None], own, 0)
    return position + jnp.reshape(jnp.asarray(start, jnp.int32), (-1, 1))
