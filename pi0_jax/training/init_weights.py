"""The weights that a run starts from: random ones, those of a checkpoint, or some of either."""

from __future__ import annotations

import jax
from flax.linen import meta
from flax.traverse_util import unflatten_dict

from pi0_jax import checkpoint, pi0
from pi0_jax.config import TrainConfig
from pi0_jax.model.heads import Network
from pi0_jax.training.partition import combine, flat, is_adapter
from pi0_jax.training.state import TrainState


def check_start(config: TrainConfig, shapes: TrainState) -> None:
    """Refuses to freeze random weights.

    Raises:
        ValueError: some of what is frozen is not taken from a checkpoint.
    """
    frozen = flat(shapes.frozen)
    random = [name for name in frozen if config.init_from is None or not name.startswith(config.init_parts or "")]
    if random:
        raise ValueError(
            f"{len(random)} of {len(frozen)} frozen parameters would stay random, such as {random[0]}: take them from "
            "a checkpoint (--init-from, and --init-parts if that names parts)."
        )


def first_weights(config: TrainConfig, network: Network, shapes: TrainState):
    """All weights, in the dtypes of `shapes` and made where they will live.

    Those of a checkpoint (all, or those of `init_parts`) are read into them; adapters that the checkpoint lacks start
    without any effect (`model.lora.declare`). Everything else is random.

    Raises:
        ValueError: `init_parts` that begin no parameter; or the checkpoint is damaged or does not fit
            (`checkpoint.CheckpointError`).
    """
    names = flat(shapes.weights)
    if config.init_from is None:
        return _random(config, network, names)
    unknown = [part for part in config.init_parts if not any(name.startswith(part) for name in names)]
    if unknown:
        raise ValueError(
            f"init_parts {unknown} begin no parameter; there are {sorted({n.split('/')[0] for n in names})}."
        )
    # Each process reads a part of the files.
    part = (jax.process_index(), jax.process_count())
    checkpoint.verify(checkpoint.resolve(config.init_from), part, only=("params",))
    stored = checkpoint.param_names(config.init_from)
    taken = {
        name: leaf
        for name, leaf in names.items()
        if name.startswith(config.init_parts or "") and not (is_adapter(name) and name not in stored)
    }
    like, partial = unflatten_dict(taken, sep="/"), bool(config.init_parts)
    weights = checkpoint.restore_params(config.init_from, like, partial=partial)
    others = {name: leaf for name, leaf in names.items() if name not in taken}
    return weights if not others else combine(weights, _random(config, network, others))


def _random(config: TrainConfig, network: Network, wanted: dict):
    """Random values of some of the network's parameters; the others are not computed."""

    def init(key):
        values = flat(meta.unbox(pi0.init_params(network, key)))
        return unflatten_dict({name: values[name].astype(leaf.dtype) for name, leaf in wanted.items()}, sep="/")

    placement = unflatten_dict({name: leaf.sharding for name, leaf in wanted.items()}, sep="/")
    return jax.jit(init, out_shardings=placement)(jax.random.key(config.seed))
