"""The weights that a run starts from: random ones, those of a checkpoint, or some of either."""

from __future__ import annotations

from typing import Any

import jax
from flax.linen import meta
from flax.traverse_util import unflatten_dict

from pi0_jax import checkpoint
from pi0_jax.errors import UserError
from pi0_jax.model.head.joint import CODE_HEAD, CODE_TABLE
from pi0_jax.training.partition import combine, flat, is_adapter
from pi0_jax.training.resolve import Run
from pi0_jax.training.state import TrainState


def first_weights(run: Run, shapes: TrainState) -> Any:
    """All weights, in the dtypes of `shapes` and made where they will live.

    Those of a checkpoint (all, or those of `init_parts`) are read into them; adapters that the checkpoint lacks start
    without any effect (`model.lora.declare`), and a table of codes that it lacks, and everything else, is random.

    Raises:
        UserError: `init_parts` that begin no parameter; or the checkpoint is damaged or does not fit
            (`checkpoint.CheckpointError`).
    """
    names, source, beginnings = flat(shapes.weights), run.config.init_from, run.config.init_parts
    if source is None:
        return _random(run, names)
    if unknown := [part for part in beginnings if not any(name.startswith(part) for name in names)]:
        raise UserError(
            f"init_parts {unknown} begin no parameter; there are {sorted({n.split('/')[0] for n in names})}."
        )
    # Each process verifies its own slice of the files.
    checkpoint.verify(checkpoint.resolve(source), (jax.process_index(), jax.process_count()), only=("params",))
    stored = checkpoint.stored_params(source)
    taken = {
        name: leaf
        for name, leaf in names.items()
        if name.startswith(beginnings or "")
        and not ((is_adapter(name) or name.startswith((CODE_TABLE, CODE_HEAD))) and name not in stored)
    }
    weights = checkpoint.restore_params(source, unflatten_dict(taken, sep="/"), partial=bool(beginnings))
    others = {name: leaf for name, leaf in names.items() if name not in taken}
    return weights if not others else combine(weights, _random(run, others))


def _random(run: Run, wanted: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """Random values of the `wanted` parameters; the others are not computed."""

    def init(key):
        values = flat(meta.unbox(run.objective.network.init(key)))
        return unflatten_dict({name: values[name].astype(leaf.dtype) for name, leaf in wanted.items()}, sep="/")

    placement = unflatten_dict({name: leaf.sharding for name, leaf in wanted.items()}, sep="/")
    return jax.jit(init, out_shardings=placement)(jax.random.key(run.config.seed))
