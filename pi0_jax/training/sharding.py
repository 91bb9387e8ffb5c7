"""Placement of arrays. The only file that knows the mesh: the model names axes, this table places them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pi0_jax.config import MeshConfig
from pi0_jax.errors import UserError

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "embed_out": None,
    "modulation": None,
    "layers": None,
    "stack": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "lora_rank": None,
    "vocab": "tensor",
    "patch": None,
    "action": None,
}
"""Logical axis to mesh axis; None keeps the axis whole on each device."""

AXES = ("data", "fsdp", "tensor")
"""Axes of the mesh, from the slowest connection to the fastest."""

_BATCH: Any = RULES["batch"]
_ACTIVATIONS = ("batch", "heads", "kv_heads", "mlp")
"""Axes that the model names in its activations; the others stay whole."""
_log = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices as data x fsdp x tensor; with several slices the data axis counts replicas of all of them.

    Args:
        config: sizes; one of them may be -1, which takes what remains.
        devices: to arrange; None: all, of all processes.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or the devices are in another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in AXES]
    known = math.prod(n for n in (*sizes, config.slices) if n != -1)
    if known > 0 and sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(*sizes, config.slices) < 1 or math.prod(sizes) * config.slices != len(devices):
        named = [f"{config.slices} slices of"] * (config.slices != 1)
        named += [" x ".join(f"{name} {getattr(config, name)}" for name in AXES)]
        raise UserError(
            f"a mesh of {' '.join(named)} does not fit {len(devices)} devices; their product has to be that "
            "number, and one of them may be -1 (--mesh.data -1 --mesh.fsdp 1)."
        )
    # Within a slice JAX knows which devices are neighbours.
    blocks = [jax.make_mesh(tuple(sizes), AXES, devices=d).devices for d in _slices(devices, config.slices)]
    return Mesh(np.concatenate(blocks), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any], count: int) -> list[list[Any]]:
    """The devices by slice: their own index, or else (GPUs, CPUs) equal runs in the order of processes."""
    indices = [getattr(device, "slice_index", 0) for device in devices]
    if count > 1 and len(set(indices)) not in (1, count):
        raise UserError(f"--mesh.slices is {count}, and the devices are in {len(set(indices))} slices.")
    if count == 1 or len(set(indices)) == 1:
        size = len(devices) // count
        return [list(devices[start : start + size]) for start in range(0, len(devices), size)]
    return [[d for d, i in zip(devices, indices, strict=True) if i == index] for index in sorted(set(indices))]


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
        names = leaf.names if _is_box(leaf) else None
        # A box may be empty: Muon masks Adam's leaves, and the other way round.
        value = leaf.unbox() if names else leaf
        return jax.tree.map(lambda x: NamedSharding(mesh, _spec(mesh, path, _names_of(names, x), x.shape)), value)

    return jax.tree.map_with_path(place, boxed, is_leaf=_is_box)


def _is_box(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _names_of(names, x) -> tuple[str | None, ...]:
    """An array in a box need not have the box's axes: Adafactor keeps rows and columns, which are small."""
    return names if names and len(names) == x.ndim else (None,) * x.ndim


def _spec(mesh: Mesh, path, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    axes = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES[name] if name else None
        if axis is not None and size % _size(mesh, axis):
            _log.info("%s: %s of %d stays whole on each device", jax.tree_util.keystr(path), name, size)
            axis = None
        axes.append(axis)
    return PartitionSpec(*axes)


def batch_ways(mesh: Mesh) -> int:
    """Number of groups of devices that a batch is divided over."""
    return _size(mesh, _BATCH)


def batch_sharding(mesh: Mesh, batch_size: int, grad_accum_steps: int = 1) -> NamedSharding:
    """Divides the first axis of every array of a batch over all devices that do not share their examples.

    Raises:
        UserError: the batch size is not a multiple of their number times the number of microbatches.
    """
    ways = batch_ways(mesh)
    multiple = ways * grad_accum_steps
    if batch_size % multiple:
        nearest = max(multiple, batch_size // multiple * multiple)
        several = grad_accum_steps > 1
        raise UserError(
            f"batch_size {batch_size} does not divide over {ways} devices"
            f"{f' in {grad_accum_steps} microbatches each' if several else ''}; take a multiple of {multiple}, such as "
            f"--batch-size {nearest}{', or other --grad-accum-steps' if several else ''}."
        )
    return NamedSharding(mesh, PartitionSpec(_BATCH))


def local_rows(placement: NamedSharding, batch_size: int) -> np.ndarray:
    """Numbers of the examples of a batch that the devices of this process need, ascending."""
    rows = np.arange(batch_size)
    slices = placement.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[:0], *(rows[index] for index in slices)]))


def place(batch, placement: NamedSharding, batch_size: int, rows: np.ndarray):
    """The global arrays of a batch over all processes, each of which has the examples that its own devices need: the
    `rows` of `local_rows`, along the first axes of its numpy arrays."""
    if placement.is_fully_addressable:
        return jax.device_put(batch, placement)

    def make_global(x):
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), placement, shard)

    return jax.tree.map(make_global, batch)


def with_constraints(mesh: Mesh, boxed, function: Callable) -> Callable:
    """A function in which `nn.with_logical_constraint` places activations on the mesh.

    Without constraints GSPMD may propagate weight shardings to activations: it gathers the whole batch on each device
    and divides the width instead. With them it gathers weights, a layer at a time, as FSDP means it.

    Args:
        mesh: of `make_mesh`.
        boxed: the parameters, whose sizes say which axes divide: with one key/value head `kv_heads` stays whole.
        function: to be traced with the constraints.
    """
    sizes: dict[str, set[int]] = {name: set() for name in _ACTIVATIONS}
    for leaf in jax.tree.leaves(boxed, is_leaf=_is_box):
        for name, size in zip(leaf.names, leaf.value.shape, strict=True):
            sizes.get(name, set()).add(size)
    rules = [(name, RULES[name]) for name in _ACTIVATIONS if not any(n % _size(mesh, RULES[name]) for n in sizes[name])]

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
            return function(*args, **kwargs)

    return function if mesh.size == 1 else wrapped


def bytes_per_device(tree, placement) -> int:
    """Bytes of a tree of arrays or shapes on each device under a placement."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, placement)
    return sum(jax.tree.leaves(sizes))


def _size(mesh: Mesh, axis: Any) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))
