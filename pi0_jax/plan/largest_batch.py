"""The largest batch whose update fits, from few compilations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from pi0_jax.config import TrainConfig
from pi0_jax.errors import UserError
from pi0_jax.plan.cost import Plan, make_plan
from pi0_jax.plan.devices import estimates, find_devices, usable_memory
from pi0_jax.training import sharding

PER_DEVICE = 8
"""Examples of a microbatch on each device that batches are multiples of."""
_PATIENCE = 4
"""Measurements after which the interval that is left is halved, in place of following a line."""

Point = tuple[int, float]
"""Batch size, and bytes on each device."""


def search(measure: Callable[[int], float], memory: float, multiple: int, guess: tuple[Point, Point]) -> int:
    """Finds the largest multiple that fits: it was measured to fit, and the next one not to. 0 where none fits.

    What a batch takes is nearly linear in its size, so the next to measure is where the line through the two nearest
    to the memory so far meets it; the first ones follow the slope of the guess.

    Args:
        measure: batch size → bytes on each device.
        memory: bytes that there are.
        multiple: of which batch sizes are multiples.
        guess: an estimate at two batch sizes.
    """
    known: dict[int, float] = {}
    while True:
        fits = max((n for n, size in known.items() if size <= memory), default=0)
        over = min((n for n, size in known.items() if size > memory), default=math.inf)
        if over - fits == multiple:
            return fits
        bisects = len(known) >= _PATIENCE and over < math.inf
        aim = (fits + over) / 2 if bisects else _meets(memory, known, guess)
        aim = max(multiple * math.floor(aim / multiple), fits + multiple)
        aim = min(aim, int(over) - multiple) if over < math.inf else aim
        known[aim] = measure(aim)


def _meets(memory: float, known: dict[int, float], guess: tuple[Point, Point]) -> float:
    """The batch size at which a line through what is known meets the memory."""
    (n, size), (other, other_size) = guess
    slope = (other_size - size) / (other - n)
    nearest = sorted(known.items(), key=lambda point: abs(point[1] - memory))[:2]
    if nearest:
        n, size = nearest[0]
    if len(nearest) == 2:
        slope = (nearest[1][1] - size) / (nearest[1][0] - n)
    return n + (memory - size) / slope if slope > 0 else 2 * n


def find_largest(config: TrainConfig, topology: str | None, report: Callable[[Plan, float], None]) -> Plan | None:
    """Plan of the largest batch that fits, found by the compiler, or by estimates where there is none for the devices.

    On GPUs it fits without XLA computing anything again, which it would do beyond: larger batches can run, more slowly.

    Args:
        config: of the run; its batch size does not matter.
        topology: as of `devices.find_devices`.
        report: is called with the plan of each batch that was tried, and the bytes that there are.

    Returns:
        None where not even the smallest batch fits.

    Raises:
        UserError: see `cost.make_plan`, or the memory of the devices is not known.
    """
    name, devices, device = find_devices(topology)
    if device is None:
        raise UserError(f"how much memory {name} has is not known: name a device, --topology h100:1 or v6e:2x2.")
    memory = usable_memory(device)
    multiple = PER_DEVICE * config.grad_accum_steps * sharding.batch_ways(sharding.make_mesh(config.mesh, devices))
    plans: dict[int, Plan] = {}

    def plan(size: int, *, compiled: bool) -> Plan:
        return make_plan(dataclasses.replace(config, batch_size=size), topology, compiled=compiled, recompute=False)

    def measure(size: int) -> float:
        plans[size] = plan(size, compiled=not estimates(devices, device))
        report(plans[size], memory)
        return plans[size].peak

    first, second = ((size, plan(size, compiled=False).peak) for size in (multiple, 2 * multiple))
    return plans.get(search(measure, memory, multiple, (first, second)))
