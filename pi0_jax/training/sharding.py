"""Where arrays live. The only file that knows the mesh: the model names axes, this table places them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pi0_jax.config import MeshConfig

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "embed_out": None,
    "modulation": None,
    "layers": None,
    "stack": None,
    "heads": None,
    "kv_heads": None,
    "head_dim": None,
    "mlp": None,
    "lora_rank": None,
    "vocab": None,
    "patch": None,
    "action": None,
}
"""Logical axis to mesh axis; None keeps the axis whole on each device."""

_log = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices as data x fsdp.

    Args:
        config: sizes; one of them may be -1, which takes what remains.
        devices: to arrange; None: all.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp]
    known = math.prod(n for n in shape if n != -1)
    if known > 0 and shape.count(-1) == 1 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"a mesh of data {config.data} x fsdp {config.fsdp} does not fit {len(devices)} devices; "
            "their product has to be that number, and one of them may be -1 (--mesh.data -1 --mesh.fsdp 1)."
        )
    return jax.make_mesh(tuple(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(mesh: Mesh, boxed):
    """The placement of every leaf of a tree with logical axis names, optimizer state included.

    An axis that its mesh axis does not divide stays whole, and a line in the log says so.

    Args:
        mesh: of `make_mesh`.
        boxed: tree from `jax.eval_shape`; leaves without names are replicated.

    Returns:
        A tree of `NamedSharding`s, with the structure of the unboxed tree.
    """

    def place(path, leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else None
        # A box may be empty: Muon masks Adam's leaves, and the other way round.
        value = leaf.unbox() if names else leaf
        return jax.tree.map(lambda x: NamedSharding(mesh, _spec(mesh, path, names or (None,) * x.ndim, x.shape)), value)

    return jax.tree.map_with_path(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def _spec(mesh: Mesh, path, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    axes = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES[name] if name else None
        if axis is not None and size % _size(mesh, axis):
            _log.info("%s: %s of %d stays whole on each device", jax.tree_util.keystr(path), name, size)
            axis = None
        axes.append(axis)
    return PartitionSpec(*axes)


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Divides the first axis of every array of a batch over all devices.

    Raises:
        ValueError: the batch size is not a multiple of the number of devices.
    """
    if batch_size % mesh.size:
        nearest = max(mesh.size, batch_size // mesh.size * mesh.size)
        raise ValueError(
            f"batch_size {batch_size} does not divide over {mesh.size} devices; take a multiple of that, "
            f"such as --batch-size {nearest}."
        )
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def keep_batch_divided(mesh: Mesh, function: Callable) -> Callable:
    """A function that calls linen modules, changed so that what they return stays divided along the batch.

    Left to itself the compiler lets the placement of the weights spread: it gathers the whole batch on each device and
    divides the width of the activations. Held to the batch it gathers weights, a layer at a time, as FSDP means it.
    """
    placement = NamedSharding(mesh, PartitionSpec(RULES["batch"]))

    def constrain(call, args, kwargs, _context):
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, placement) if _has_batch(x, mesh) else x,
            call(*args, **kwargs),
        )

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with nn.intercept_methods(constrain):
            return function(*args, **kwargs)

    return function if mesh.size == 1 else wrapped


def _has_batch(x, mesh: Mesh) -> bool:
    return isinstance(x, jax.Array) and x.ndim >= 3 and x.shape[0] % mesh.size == 0


def bytes_per_device(tree, placement) -> int:
    """Bytes of a tree of arrays or shapes on each device under a placement."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, placement)
    return sum(jax.tree.leaves(sizes))


def _size(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))
