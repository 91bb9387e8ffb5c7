"""Parameters described as data, and the one linen module that declares them.

A spec is a dictionary of names to leaves, stacks and further specs, in order: linen derives the initial value of a
parameter from the names of the scopes around it and from its place among the parameters of its scope. The mathematics
is functions of the resulting tree (`layers.py`), so initialisation and forward pass cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., Any]


class Leaf(NamedTuple):
    """One parameter, float32."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis names, which `training.sharding` places on the mesh."""
    init: Initializer


class Stack(NamedTuple):
    """Layers alike, whose parameters get a leading axis "layers"."""

    depth: int
    spec: Spec


Spec = dict[str, Any]
"""Name to `Leaf`, `Stack` or `Spec`."""


class Declare(nn.Module):
    """Declares the parameters of a spec in nested scopes."""

    spec: MappingProxyType[str, Any]
    """Read-only; linen would sort a dictionary."""

    @nn.compact
    def declare(self) -> dict[str, Any]:
        """The tree of parameters: initial values in `init`, those that were passed in `apply`."""
        return {name: self._declare_one(name, spec) for name, spec in self.spec.items()}

    def _declare_one(self, name: str, spec: Leaf | Stack | Spec) -> Any:
        if isinstance(spec, Leaf):
            init = nn.with_logical_partitioning(spec.init, spec.axes)
            return self.param(name, init, spec.shape, jnp.float32)
        if isinstance(spec, Stack):
            # Not nn.vmap, whose initial values differ from those of layers that linen scans.
            stacked = nn.scan(
                lambda layer, carry: (carry, layer.declare()),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=spec.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stacked(Declare(MappingProxyType(spec.spec), name=name), None)[1]
        return Declare(MappingProxyType(spec), name=name).declare()


def linear(
    inputs: int | tuple[int, ...],
    outputs: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer = nn.initializers.lecun_normal(),
) -> Spec:
    """A kernel and a bias; of several input or output axes, the kernel is initialised as a matrix of their products."""
    inputs, outputs = (x if isinstance(x, tuple) else (x,) for x in (inputs, outputs))
    matrix = (int(np.prod(inputs)), int(np.prod(outputs)))

    def kernel(key, shape, dtype):
        return init(key, matrix, dtype).reshape(shape)

    return {
        "kernel": Leaf((*inputs, *outputs), axes, kernel),
        "bias": Leaf(outputs, axes[len(inputs) :], nn.initializers.zeros_init()),
    }
