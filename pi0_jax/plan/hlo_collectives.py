"""What a compiled program sends between devices.

Ring algorithms are assumed, which send the least: of an array of B bytes, whole, over n devices,

    all-gather, reduce-scatter, all-to-all   B (n - 1) / n
    all-reduce                               2 B (n - 1) / n
    collective-permute                       B
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from pi0_jax.flops import Device
from pi0_jax.plan import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf"(?:ragged-)?({'|'.join(KINDS)})(-start)?")
_GROUP_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?")
_GROUP_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+,\d+)\}")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    channel: str
    """Its channel; pieces of one collective, spread over fusions, have the same one."""
    sent: float
    """Bytes that each device sends each time."""
    group: tuple[int, ...]
    """Numbers of the devices of its first group."""

    def seconds(self, device: Device) -> float:
        """By the data sheet: within a node at the rate of its links; rings over several nodes leave each of them by as
        many adapters as it has devices of the group."""
        nodes = collections.Counter(number // device.node for number in self.group) if device.node else {}
        rate = device.link if len(nodes) < 2 else min(device.link, device.network * max(nodes.values()))
        return self.sent / rate


def traffic(program: hlo.Program) -> dict[str, float]:
    """Bytes that each device sends in one run of a program, by kind of collective; kinds that do not occur are 0.

    Raises:
        ValueError: a loop with collectives does not say how often it runs.
    """
    found = collectives(program)
    return {kind: sum((times * it.sent for it, times in found if it.kind == kind), 0.0) for kind in KINDS}


def network_seconds(program: hlo.Program, device: Device) -> float:
    """Seconds of all collectives of one run of a program, one after another, by the data sheet.

    Raises:
        ValueError: as of `traffic`.
    """
    return sum((times * it.seconds(device) for it, times in collectives(program)), 0.0)


def collectives(program: hlo.Program) -> list[tuple[Collective, float]]:
    """Collectives of a program that send something, and how often each runs."""
    most: dict[str, tuple[Collective, float]] = {}
    for name, times in hlo.times(program).items():
        for instruction in program.computations[name].values():
            found = collective(instruction)
            if found is None or not found.sent:
                continue
            if math.isnan(times):
                raise ValueError(f"the program sends data in a loop whose rounds are not known: {instruction.name}")
            key = found.channel or f"{name} {instruction.name}"
            most[key] = max(most.get(key, (found, 0.0)), (found, times), key=lambda x: x[0].sent * x[1])
    return list(most.values())


def collective(instruction: hlo.Instruction) -> Collective | None:
    """What an instruction sends, if it does."""
    match = _COLLECTIVE.fullmatch(instruction.op)
    if match is None:
        return None
    kind, started = match.groups()
    group = _group(instruction.attributes)
    count = len(group)
    whole = hlo.nbytes(instruction.arrays)
    if started and kind != "all-reduce":  # the result holds the operands too, and words for synchronisation
        share = {"all-gather": count / (count + 1), "reduce-scatter": count / (count + 1)}.get(kind, 0.5)
        whole *= share
    elif kind == "reduce-scatter":
        whole *= count
    ways = {"all-reduce": 2 * (count - 1) / count, "collective-permute": 1.0}
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    sent = whole * ways.get(kind, (count - 1) / count)
    return Collective(kind, channel[1] if channel else "", sent, group)


def _group(attributes: str) -> tuple[int, ...]:
    """Devices of a collective's first group."""
    if match := _GROUP_LIST.search(attributes) or _PAIRS.search(attributes):
        return tuple(_numbers(match[1]))
    if match := _GROUP_IOTA.search(attributes):
        return _order(match[3], match[4])[: int(match[2])]
    if match := _GROUP_MESH.search(attributes):
        parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4])
        places = _of_mesh(re.findall(r"'(\w+)'=(\d+)", match[1]), parts)
        order = _order(match[2], match[3]) if match[2] else None
        return places if order is None else tuple(order[place] for place in places)
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"the devices of a collective are written in a way that is not known: {attributes[:200]}")
    return 0, 1


def _order(shape: str, transposed: str | None) -> tuple[int, ...]:
    """Numbers of devices, counted in an array of that shape and read in another order of its axes."""
    sizes = _numbers(shape)
    order = _numbers(transposed) if transposed else range(len(sizes))
    return tuple(np.arange(math.prod(sizes)).reshape(sizes).transpose(order).ravel().tolist())


def _of_mesh(axes: list[tuple[str, str]], parts: list[tuple[str, str, str]]) -> tuple[int, ...]:
    """Places in a mesh of the first group over axes, or over parts of axes: so many after so many times as many."""
    sizes = {name: int(size) for name, size in axes}
    strides = dict(zip(sizes, np.cumprod([1, *list(sizes.values())[:0:-1]])[::-1].tolist(), strict=True))
    group = np.zeros(1, int)
    for name, before, size in parts:
        count = int(size or sizes[name])
        stride = strides[name] * (sizes[name] // (int(before or 1) * count))
        group = (group[:, None] + stride * np.arange(count)).ravel()
    return tuple(group.tolist())


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
