"""The text of a compiled program (optimised HLO): its instructions, how often they run, and from which lines of code.

The text has each instruction once, inside the loops that run it many times, so the number of rounds of every loop
around it counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLS = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LOGIC = ("compare", "and", "or", "not")
_ROUNDS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|f4\w*|c64|c128)\[([\d,]*)\](\{[^}]*\})?")


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    memory: str
    """Its memory space, such as S(1) for a TPU's VMEM; "" is the device's main memory."""

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * bits(self.dtype) / 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    result: str
    """Types of what it gives, as in the text."""
    op: str
    operands: tuple[str, ...]
    """Names of the instructions that it takes, or the text in the parentheses of parameters and constants."""
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        found = _ARRAY.findall(self.result)
        return [
            Array(dtype, tuple(int(n) for n in shape.split(",") if n), "".join(re.findall(r"S\(\d+\)", layout)))
            for dtype, shape, layout in found
        ]

    @property
    def called(self) -> list[str]:
        """Computations that it runs; of a loop the body."""
        names = _CALLS.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return names


class Program(NamedTuple):
    """A compiled program."""

    entry: str
    computations: dict[str, dict[str, Instruction]]
    """Instructions by name, in order, the result last; by the name of their computation."""
    frames: dict[int, tuple[str, int]]
    """Line of code (file:line) of a stack frame, and the number of the frame that called it (0: none)."""

    def rounds(self, loop: Instruction, early: int | None = None) -> float:
        """Rounds of a loop: as the compiler notes them, which libtpu's does not, or else the one constant that its
        counter from 0 is compared with. One whose condition looks at more than the counter, such as at a flag that says
        that all rows have ended, runs no more than `early` where that is given. NaN where nothing says."""
        if known := _ROUNDS.search(loop.attributes):
            return float(known[1])
        condition = _CONDITION.search(loop.attributes)
        within = list(self.computations.get(condition[1], {}).values()) if condition else []
        within += [i for it in within for name in it.called for i in self.computations.get(name, {}).values()]
        bounds = [i.operands[0] for i in within if i.op == "constant" and re.match(r"[su]\d+\[\]", i.result)]
        found = [float(bounds[0])] if len(bounds) == 1 else []
        counted = found and [i.op for i in within if i.op in _LOGIC] == ["compare"]
        return min(found + ([] if early is None or counted else [float(early)]), default=math.nan)

    def stack(self, instruction: Instruction) -> list[str]:
        """Lines of code (file:line) that an instruction comes from, the innermost first."""
        if frame := re.search(r"stack_frame_id=(\d+)", instruction.attributes):
            lines, number = [], int(frame[1])
            while number in self.frames and len(lines) < 50:
                line, number = self.frames[number]
                lines.append(line)
            return lines
        line = re.search(r'source_file="([^"]*)"(?: source_line=(\d+))?', instruction.attributes)
        return [f"{line[1]}:{line[2]}"] if line else []


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Args:
        text: `jax.stages.Compiled.as_text()`.
    """
    entry, body, computations = "", None, {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            body = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None and (match := _INSTRUCTION.match(line)):
            name, result, op, rest = match.groups()
            inside, attributes = _operands(rest)
            named = tuple(re.findall(r"%([\w.\-]+)", inside)) or ((inside,) if inside else ())
            body[name] = Instruction(name, result, op, named, attributes)
    return Program(entry, computations, _frames(text))


def times(program: Program) -> dict[str, float]:
    """How often each computation that the entry reaches runs; NaN where a loop around it does not say."""
    found = dict.fromkeys(program.computations, 0.0)

    def visit(name: str, count: float):
        found[name] += count
        for instruction in program.computations[name].values():
            rounds = program.rounds(instruction) if instruction.op == "while" else 1.0
            for other in instruction.called:
                if other in found:
                    visit(other, count * rounds)

    visit(program.entry, 1.0)
    return {name: count for name, count in found.items() if count}


def nbytes(arrays: Sequence[Array]) -> float:
    return sum((array.bytes for array in arrays), 0.0)


def bits(dtype: str) -> int:
    """Bits of a number of a type, such as bf16, f8e4m3fn, s4 or pred."""
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _operands(rest: str) -> tuple[str, str]:
    """What follows an opening parenthesis, divided at the closing one."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""


def _frames(text: str) -> dict[int, tuple[str, int]]:
    """The tables of stack frames in the head of the text; empty where the compiler prints none."""

    def table(title: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return {int(n): row for n, row in re.findall(r"^(\d+) (.*)$", found[1] if found else "", re.MULTILINE)}

    def numbers(row: str) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", row)}

    files, lines = table("FileNames"), {}
    for number, row in table("FileLocations").items():
        at = numbers(row)
        lines[number] = f"{files.get(at['file_name_id'], '?').strip(chr(34))}:{at['line']}"
    frames = {number: numbers(row) for number, row in table("StackFrames").items()}
    # The number of the caller is printed one too high, so that 1 means none.
    return {n: (lines.get(at["file_location_id"], "?"), at.get("parent_frame_id", 1) - 1) for n, at in frames.items()}
