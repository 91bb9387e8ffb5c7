"""Matrix-product FLOPs of a JAX function, counted exactly in its jaxpr, without running or compiling it; data sheets.

A product of `[m, k]` with `[k, n]` counts 2·m·k·n; element-wise work, a percent of it in these models, is left out. The
count is of what the function asks for, rematerialisation included, before the compiler sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax import pi0
from pi0_jax.batch import example_batch
from pi0_jax.config import ModelConfig, ObjectiveConfig
from pi0_jax.objective import Objective, make_objective

GIB = 2**30


class Device(NamedTuple):
    """The maker's data sheet of one device."""

    memory: float
    """Bytes that a program may use."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s that it can send to its neighbours, over all links."""
    node: int = 0
    """Devices that `link` connects; 0: all."""
    network: float = 0.0
    """Bytes/s that each device can send to other nodes."""
    clock: float = 0.0
    """Cycles/s, of TPUs; approximate for some."""


TPUS = {
    "v4": Device(30.75 * GIB, 275e12, 1228e9, 300e9, clock=1.05e9),
    "v5e": Device(15.75 * GIB, 197e12, 819e9, 200e9, clock=1.5e9),
    "v5p": Device(95 * GIB, 459e12, 2765e9, 600e9, clock=1.75e9),
    "v6e": Device(31.25 * GIB, 918e12, 1640e9, 400e9, clock=1.75e9),
}
"""By libtpu's name of a topology. Links: half of the bidirectional figure of cloud.google.com/tpu/docs."""
GPUS = {
    "a100": Device(79 * GIB, 312e12, 2039e9, 300e9, 8, 25e9),
    "h100": Device(79 * GIB, 989e12, 3350e9, 450e9, 8, 50e9),
    "h200": Device(139 * GIB, 989e12, 4800e9, 450e9, 8, 50e9),
    "l40s": Device(44 * GIB, 362e12, 864e9, 32e9, 8, 25e9),
    "rtx4090": Device(23.5 * GIB, 165e12, 1008e9, 32e9, 8, 12.5e9),
    "rtx5090": Device(31.3 * GIB, 209.5e12, 1792e9, 64e9, 8, 12.5e9),
    "b200": Device(177 * GIB, 2250e12, 7672e9, 900e9, 8, 50e9),
    "thor": Device(120 * GIB, 259e12, 273e9, 12.5e9, 1, 12.5e9),
}
"""SXM where there is a choice; nodes of eight, with one 200 Gb/s (A100) or 400 Gb/s (Hopper) adapter per device."""
KINDS = {
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e"},
    **{"A100": "a100", "H100": "h100", "H200": "h200", "L40S": "l40s", "RTX 4090": "rtx4090"},
    **{"RTX 5090": "rtx5090", "B200": "b200", "Thor": "thor"},
}
"""What `jax.Device.device_kind` contains, to the device's name above; the first that fits."""


def device_name(device_kind: str) -> str | None:
    """Name of a device (`jax.Device.device_kind`) in `TPUS` or `GPUS`; None for one that is in neither."""
    return next((name for part, name in KINDS.items() if part in device_kind), None)


def sheet(device_kind: str) -> Device | None:
    """Data sheet of a device (`jax.Device.device_kind`); None for one that is not in the table."""
    name = device_name(device_kind)
    return None if name is None else (TPUS | GPUS)[name]


def peak(device_kind: str) -> float | None:
    """FLOP/s of a device; None for one that is not in the table."""
    found = sheet(device_kind)
    return None if found is None else found.flops


def count(function: Callable, *args: Any) -> int:
    """FLOPs of the matrix products and convolutions of a function; of branches those of the largest, of loops that may
    end early all rounds.

    Args:
        function: what `jax.jit` takes, or gave.
        args: arrays, or their shapes (`jax.ShapeDtypeStruct`).

    Raises:
        ValueError: a loop whose number of iterations is not known.
    """
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    return _of(jitted.trace(*args).jaxpr.jaxpr)  # JAX traces a function with compiler options in no other way


def _of(jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        return 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    inner = [_of(getattr(part, "jaxpr", part)) for part in _subprograms(params)]
    if name == "while" and any(inner):
        return _most_rounds(params["cond_jaxpr"]) * sum(inner)
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _most_rounds(condition) -> int:
    """What the counter of a `while` loop is held below: the one whole number in its condition."""
    compared = (x for it in condition.eqns if it.primitive.name == "lt" for x in it.invars)
    bounds = [int(x.val) for x in compared if hasattr(x, "val") and x.aval.dtype.kind in "iu"]
    if len(bounds) != 1:
        raise ValueError("a while loop with matrix products whose counter has no bound has no number of FLOPs.")
    return bounds[0]


def _subprograms(params: dict[str, Any]) -> list[Any]:
    values = [x for value in params.values() for x in (value if isinstance(value, (tuple, list)) else (value,))]
    return [x for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def training(
    model: ModelConfig, config: ObjectiveConfig, *, backward: bool = True, frozen: Collection[str] = frozenset()
) -> int:
    """FLOPs of one observation's loss, and of its gradient by the parameters whose paths are not `frozen`."""
    objective, batch = make_objective(config, model), example_batch(model, 1, config.target_length)
    weights = _params(objective)
    params = flatten_dict(weights, sep="/")
    teacher = () if objective.teacher is None else (weights,)

    def loss(trainable, others, *teacher):
        combined = unflatten_dict(trainable | others, sep="/")
        return pi0.loss(objective, combined, batch, jax.random.key(0), 0, *teacher)[0]

    trainable = {name: x for name, x in params.items() if name not in frozen}
    others = {name: x for name, x in params.items() if name in frozen}
    return count(jax.grad(loss) if backward else loss, trainable, others, *teacher)


def _params(objective: Objective):
    return nn.meta.unbox(jax.eval_shape(objective.network.init, jax.random.key(0)))
