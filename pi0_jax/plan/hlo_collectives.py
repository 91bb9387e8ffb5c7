"""What a compiled program sends between devices.

Ring algorithms are assumed, which send the least: of an array of B bytes, whole, over n devices,

    all-gather, reduce-scatter, all-to-all   B (n - 1) / n
    all-reduce                               2 B (n - 1) / n
    collective-permute                       B
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from pi0_jax.plan import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf"(?:ragged-)?({'|'.join(KINDS)})(-start)?")
_GROUP_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    channel: str
    """Its channel; pieces of one collective, spread over fusions, have the same one."""
    sent: float
    """Bytes that each device sends each time."""


def traffic(program: hlo.Program) -> dict[str, float]:
    """Bytes that each device sends in one run of a program, by kind of collective; kinds that do not occur are 0.

    Raises:
        ValueError: a loop with collectives does not say how often it runs.
    """
    most: dict[str, tuple[str, float]] = {}
    for name, times in hlo.times(program).items():
        for instruction in program.computations[name].values():
            found = collective(instruction)
            if found is None or not found.sent:
                continue
            if math.isnan(times):
                raise ValueError(f"the program sends data in a loop whose rounds are not known: {instruction.name}")
            key = found.channel or f"{name} {instruction.name}"
            most[key] = max(most.get(key, (found.kind, 0.0)), (found.kind, times * found.sent), key=lambda x: x[1])
    return {kind: sum((sent for k, sent in most.values() if k == kind), 0.0) for kind in KINDS}


def collective(instruction: hlo.Instruction) -> Collective | None:
    """What an instruction sends, if it does."""
    match = _COLLECTIVE.fullmatch(instruction.op)
    if match is None:
        return None
    kind, started = match.groups()
    count = _devices(instruction.attributes)
    whole = hlo.nbytes(instruction.arrays)
    if started and kind != "all-reduce":  # the result holds the operands too, and words for synchronisation
        share = {"all-gather": count / (count + 1), "reduce-scatter": count / (count + 1)}.get(kind, 0.5)
        whole *= share
    elif kind == "reduce-scatter":
        whole *= count
    ways = {"all-reduce": 2 * (count - 1) / count, "collective-permute": 1.0}
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return Collective(kind, channel[1] if channel else "", whole * ways.get(kind, (count - 1) / count))


def _devices(attributes: str) -> int:
    """Devices of a collective's group."""
    if match := _GROUP_LIST.search(attributes):
        return len(match[1].split(","))
    if match := _GROUP_IOTA.search(attributes):
        return int(match[1])
    if match := _GROUP_MESH.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return 2  # a permutation has pairs instead of groups
