"""What a compiled program sends between devices, read off its optimised HLO text.

The text lists each collective once, inside the loops that run it many times, so the number of rounds of every loop
around it counts. Ring algorithms are assumed, which send the least: of an array of B bytes, whole, over n devices,

    all-gather, reduce-scatter, all-to-all   B (n - 1) / n
    all-reduce                               2 B (n - 1) / n
    collective-permute                       B
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) (?:ragged-)?({'|'.join(KINDS)})(-start)?\(")
_CALLS = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_ROUNDS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_BOUND = re.compile(r"[su]\d+\[\][^ ]* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64|c128)\[([\d,]*)\]")
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


def traffic(text: str) -> dict[str, float]:
    """Bytes that each device sends in one run of a program, by kind of collective; kinds that do not occur are 0.

    Args:
        text: `jax.stages.Compiled.as_text()`.

    Raises:
        ValueError: a loop with collectives does not say how often it runs.
    """
    entry, bodies = _computations(text)
    most: dict[str, tuple[str, float]] = {}
    for name, times in _times(entry, bodies).items():
        for number, line in enumerate(bodies[name]):
            found = _collective(line)
            if found is None or not found.sent:
                continue
            if math.isnan(times):
                raise ValueError(f"the program sends data in a loop whose rounds are not known: {line[:200]}")
            key = found.channel or f"{name} {number}"
            most[key] = max(most.get(key, (found.kind, 0.0)), (found.kind, times * found.sent), key=lambda x: x[1])
    return {kind: sum((sent for k, sent in most.values() if k == kind), 0.0) for kind in KINDS}


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Name of the entry, and the lines of every computation by its name."""
    entry, name, bodies = "", None, {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            bodies[name].append(line)
    return entry, bodies


def _times(entry: str, bodies: dict[str, list[str]]) -> dict[str, float]:
    """How often each computation that the entry reaches runs; NaN where a loop around it does not say."""
    times = dict.fromkeys(bodies, 0.0)

    def visit(name: str, count: float):
        times[name] += count
        for line in bodies[name]:
            loop = _LOOP.search(line)
            called = [*_CALLS.findall(line)]
            for names in _BRANCHES.findall(line):
                called += [part.strip().lstrip("%") for part in names.split(",")]
            rounds = _rounds(line, bodies[loop[1]]) if loop else 1.0
            for other in called:
                if other in bodies:
                    visit(other, count * rounds)

    visit(entry, 1.0)
    return {name: count for name, count in times.items() if count}


def _rounds(line: str, condition: list[str]) -> float:
    """Rounds of a loop: as the compiler notes them, or else the one constant that its counter from 0 is held to."""
    if known := _ROUNDS.search(line):
        return float(known[1])
    bounds = [int(match[1]) for part in condition if (match := _BOUND.search(part))]
    return float(bounds[0]) if len(bounds) == 1 else math.nan


def _collective(line: str) -> Collective | None:
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    result, kind, started = match.groups()
    count = _devices(line)
    arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
    whole = float(sum(arrays))
    if started and kind != "all-reduce":  # the result holds the operands too, and words for synchronisation
        share = {"all-gather": count / (count + 1), "reduce-scatter": count / (count + 1)}.get(kind, 0.5)
        whole *= share
    elif kind == "reduce-scatter":
        whole *= count
    ways = {"all-reduce": 2 * (count - 1) / count, "collective-permute": 1.0}
    channel = re.search(r"channel_id=(\d+)", line)
    return Collective(kind, channel[1] if channel else "", whole * ways.get(kind, (count - 1) / count))


def _devices(line: str) -> int:
    """Devices of a collective's group."""
    if match := _GROUP_LIST.search(line):
        return len(match[1].split(","))
    if match := _GROUP_IOTA.search(line):
        return int(match[1])
    if match := _GROUP_MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return 2  # a permutation has pairs instead of groups


def _bytes(kind: str, sizes: str) -> int:
    bits = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}.get(kind) or int(re.findall(r"\d+", kind)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * max(bits, 8) // 8
