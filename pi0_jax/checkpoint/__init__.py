"""Checkpoints: one folder per step, written by training and conversion, read by training and inference.

    <run>/checkpoints/<step>/
        params/        weights to run (their moving average where that is on), the PyTree item {"params": tree},
                       which openpi reads too
        train_state/   what only training needs: step, live weights (with a moving average), optimizer state
        data_state/    iterator.json: position of the data iterator
        assets/        config.json, norm_stats.json, tokenizer.model, and fast/ (a codec of action tokens): plain files
        metrics/       validation loss, where the best checkpoints are kept
        digests.json   size and CRC-32 of every file above

Running a policy takes `params` and `assets` and nothing from the repository. Orbax (v0 API) writes a step under a
temporary name, in a background thread, and renames it when it is complete: a folder with a step's name was complete
when it was written, and `verify` says whether it still is.

Orbax is imported at the first use of a name that needs it: reading where a checkpoint is and its assets does not.
"""

# ruff: noqa: F401
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pi0_jax.checkpoint.assets import (
    Assets,
    load_assets,
    load_data_state,
    policy_from_json,
    policy_to_json,
    write_assets,
)
from pi0_jax.checkpoint.digests import verify
from pi0_jax.checkpoint.locate import (
    CheckpointError,
    Found,
    identify,
    latest_step,
    resolve,
    run_folder,
    set_aside,
    steps,
)

if TYPE_CHECKING:
    from pi0_jax.checkpoint.reader import restore_params, restore_train_state, stored_params
    from pi0_jax.checkpoint.space import tree_bytes
    from pi0_jax.checkpoint.writer import CheckpointWriter

_LAZY = {name: "reader" for name in ("restore_params", "restore_train_state", "stored_params")}
_LAZY |= {"tree_bytes": "space", "CheckpointWriter": "writer"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
