"""Kernels of a compiled program and what each costs on a device: nothing is run.

On a GPU a kernel takes as long as what bounds it by the data sheet, products or memory, and `LAUNCH_SECONDS` more to
start. On a TPU it takes the cycles that the compiler estimates, and the program at least as long as its bytes through
main memory. Real kernels are slower than their roofline; two programs compare well by it. Data that a cache would keep
between two kernels count as read again.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pi0_jax.flops import Device
from pi0_jax.plan.hlo import Array, Instruction, Program, bits, nbytes
from pi0_jax.plan.hlo_collectives import collective

LAUNCH_SECONDS = 2e-6
"""What a GPU takes to start a kernel: an assumption, between a CUDA graph (about 1) and plain launches (3 to 5)."""

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
"""Operations of which TPUs run one part after another: `copy-start`, `copy-done`."""
_SLICES = ("slice", "dynamic-slice", "gather")
_SAME_NUMBERS = ("bitcast", "convert", "copy", "transpose")
"""Operations whose result has the numbers of their operand, so that a slice of one is as large a part of the other."""
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that change a part of their first operand, and which operand has what is new."""


class Kernel(NamedTuple):
    """One kernel, and what it costs each time."""

    times: float
    """How often it runs, loops multiplied out."""
    kind: str
    """product, collective, copy, fusion, or what XLA calls it."""
    result: str
    """Type and shape of what it gives, without layout."""
    lines: tuple[str, ...]
    """Lines of code (file:line) that it comes from, the innermost first."""
    bytes: float
    """Read from and written to the device's main memory."""
    flops: float
    """Of matrix products and convolutions."""
    seconds: float
    cycles: float = 0.0
    """The compiler's estimate, of TPUs."""


class Cost(NamedTuple):
    """Sums over a program's kernels."""

    kernels: int
    """How many run."""
    bytes: float
    flops: float
    seconds: float
    """Each kernel at its roofline; of TPUs the compiler's cycles."""
    product_seconds: float
    """Of these, kernels with matrix products."""
    launch_seconds: float
    """Of GPUs, on top."""
    cycles: float
    memory_seconds: float
    """All bytes at the data sheet's rate."""

    @property
    def total_seconds(self) -> float:
        """Of one run."""
        return max(self.seconds + self.launch_seconds, self.memory_seconds)


class Group(NamedTuple):
    """Kernels of one kind that come from the same lines of code, all times that they run together."""

    kind: str
    place: str
    seconds: float
    kernels: int
    bytes: float
    flops: float


def kernels(program: Program, device: Device, unknown_rounds: int | None = None) -> list[Kernel]:
    """Every kernel of a program.

    Args:
        program: compiled for the device.
        device: its data sheet.
        unknown_rounds: of loops that may end early, at most; None: all that their counter allows.

    Raises:
        ValueError: there is a loop without a counter whose end is known, and `unknown_rounds` is None.
    """
    return list(Counter(program, device, unknown_rounds).walk(program.entry, 1.0))


def total(found: Sequence[Kernel], device: Device) -> Cost:
    """Sums of kernels."""
    count, moved = round(_sum(found)), _sum(found, "bytes")
    return Cost(
        kernels=count,
        bytes=moved,
        flops=_sum(found, "flops"),
        seconds=_sum(found, "seconds"),
        product_seconds=_sum([k for k in found if k.flops], "seconds"),
        launch_seconds=0.0 if device.clock else count * LAUNCH_SECONDS,
        cycles=_sum(found, "cycles"),
        memory_seconds=moved / device.bandwidth,
    )


def _sum(found: Sequence[Kernel], name: str = "") -> float:
    """Of a field over all times that the kernels run; without one, these times."""
    return sum((k.times * (getattr(k, name) if name else 1.0) for k in found), 0.0)


def largest(found: Sequence[Kernel], count: int = 10) -> list[Group]:
    """The kernels that take the most time together, of one kind and from the same lines of code."""
    groups = collections.defaultdict(list)
    for kernel in found:
        groups[kernel.kind, place(kernel.lines)].append(kernel)
    made = [
        Group(kind, where, _sum(group, "seconds"), round(_sum(group)), _sum(group, "bytes"), _sum(group, "flops"))
        for (kind, where), group in groups.items()
    ]
    return sorted(made, key=lambda group: -group.seconds)[:count]


def place(lines: Sequence[str]) -> str:
    """The innermost line of code, and the first one of another file that led to it; paths from the package on."""
    short = [re.sub(r".*/(?:site-packages|src|pi0_jax)/", "", line) for line in lines]
    others = [line for line in short if line.partition(":")[0] != short[0].partition(":")[0]]
    return " < ".join(short[:1] + others[:1]) or "the compiler's own"


class Counter:
    """Walks a program."""

    def __init__(self, program: Program, device: Device, unknown_rounds: int | None):
        self.program, self.device, self.unknown_rounds = program, device, unknown_rounds
        self.users: dict[str, dict[str, list[Instruction]]] = {}

    def walk(self, name: str, count: float) -> Iterator[Kernel]:
        """Kernels of a computation that runs so often."""
        for it in self.program.computations[name].values():
            started, done = it.op.removesuffix("-start"), it.op.removesuffix("-done")
            if it.op in FREE or (started != it.op and started in _COPIES):
                continue
            if it.op == "while":
                yield from self.walk(it.called[0], count * self.rounds(it))
            elif it.op == "conditional":  # the branch that takes longest
                branches = [list(self.walk(other, count)) for other in it.called]
                yield from max(branches, key=lambda found: sum(k.times * k.seconds for k in found))
            elif it.op in ("call", "async-start"):
                for other in it.called:
                    yield from self.walk(other, count)
            elif done == it.op or done in _COPIES:
                yield self.kernel(name, it, count)

    def rounds(self, loop: Instruction) -> float:
        rounds = self.program.rounds(loop, self.unknown_rounds)
        if math.isnan(rounds):
            raise ValueError(f"the program has a loop whose rounds are not known: {loop.name}")
        return rounds

    def kernel(self, name: str, it: Instruction, count: float) -> Kernel:
        products = list(self._products(name, it))
        flops = sum((work for work, _ in products), 0.0)
        # The data sheet is of 16 bits; half as many take half as long, and float32 is multiplied as TF32.
        slow = sum(work * (min(width, 32) / 16) for work, width in products)
        moved, kind = self._moved(name, it), it.op.removesuffix("-done")
        if flops:
            kind = "product"
        elif collective(it) is not None:
            kind = "collective"
        elif it.op == "custom-call":
            kind = _attribute(it, r'custom_call_target="([^"]+)"')
        lines = self._lines(it)
        result = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", it.result)
        cycles = float(_attribute(it, r'"estimated_cycles":"(\d+)"') or 0)
        if self.device.clock:
            seconds = cycles / self.device.clock
        else:
            seconds = max(moved / self.device.bandwidth, slow / self.device.flops)
        return Kernel(count, kind, result, tuple(lines), moved, flops, seconds, cycles)

    def _lines(self, it: Instruction) -> list[str]:
        if lines := self.program.stack(it):
            return lines
        inner = [i for other in it.called for i in self.program.computations.get(other, {}).values()]
        return next((lines for i in reversed(inner) if (lines := self.program.stack(i))), [])

    def _products(self, name: str, it: Instruction) -> Iterator[tuple[float, int]]:
        """FLOP and bits per number of the products of an instruction."""
        within = self.program.computations[name]
        target = _attribute(it, r'custom_call_target="([^"]+)"') if it.op == "custom-call" else ""
        if it.op in ("fusion", "call"):
            for other in it.called:
                for inner in self.program.computations[other].values():
                    yield from self._products(other, inner)
        elif (it.op == "dot" or "gemm" in target or "matmul" in target) and it.operands[0] in within:
            left, out = within[it.operands[0]].arrays[0], it.arrays[0]
            axes = _attribute(it, r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)[\]}]')
            contracted = math.prod(left.shape[int(axis)] for axis in re.findall(r"\d+", axes))
            yield 2.0 * math.prod(out.shape) * contracted, bits(left.dtype)
        elif it.op == "custom-call" and (work := _attribute(it, r'op_name="[^"]*\bflop_(\d+)')):
            yield float(work), 16  # a kernel of ours says so (`model.kernels`)
        elif it.op == "convolution" and it.operands[1] in within:
            left, right = (within[x].arrays[0] for x in it.operands[:2])
            yield _convolution(it, left, right), bits(left.dtype)

    def _main(self, arrays: Sequence[Array]) -> float:
        """Bytes of the arrays that are in main memory; TPUs keep some in VMEM, S(1)."""
        return nbytes([array for array in arrays if not (self.device.clock and array.memory)])

    def _moved(self, name: str, it: Instruction) -> float:
        within = self.program.computations[name]
        if it.op.removesuffix("-done") in _COPIES and it.op.endswith("-done"):
            start = within.get(it.operands[0])
            source = within.get(start.operands[0]) if start else None
            size, both = nbytes(it.arrays), self._main(it.arrays) and source and self._main(source.arrays)
            return 2 * size if both else size
        if it.op == "fusion":
            body = it.called[0]
            pairs = [(within.get(it.operands[n]), inner) for n, inner in self._parameters(body).items()]
            read = sum(self._read(body, inner) for given, inner in pairs if given is None or self._main(given.arrays))
            return read + self._written(body, it)
        if it.op in _SLICES:
            return 2 * self._main(it.arrays)
        if it.op in _IN_PLACE:
            return 2 * self._new(within, it)
        return self._main(it.arrays) + sum(self._main(within[x].arrays) for x in it.operands if x in within)

    def _read(self, body: str, it: Instruction) -> float:
        """Bytes of an array that a fused computation reads, where slices alone are taken of it or a part is changed."""
        if body not in self.users:
            self.users[body] = collections.defaultdict(list)
            for user in self.program.computations[body].values():
                for operand in set(user.operands):
                    self.users[body][operand].append(user)
        whole, read = nbytes(it.arrays), 0.0
        for user in self.users[body][it.name]:
            first = user.operands[0] == it.name and it.name not in user.operands[1:]
            if user.op in _SLICES and first:
                read += nbytes(user.arrays)
            elif user.op in _SAME_NUMBERS and nbytes(user.arrays):
                read += self._read(body, user) * whole / nbytes(user.arrays)
            elif user.op == "fusion":
                inner = self._parameters(user.called[0])
                read += sum(self._read(user.called[0], inner[n]) for n, x in enumerate(user.operands) if x == it.name)
            elif user.op == "scatter" and first:
                read += self._new(self.program.computations[body], user)  # it adds to what is there
            elif not (user.op in _IN_PLACE and first):
                return whole
        return min(read, whole) if self.users[body][it.name] else whole  # the result has all of it

    def _new(self, within: Mapping[str, Instruction], it: Instruction) -> float:
        """Bytes that an operation in place changes."""
        name = it.operands[_IN_PLACE[it.op]]
        return nbytes(within[name].arrays) if name in within else 0.0

    def _parameters(self, body: str) -> dict[int, Instruction]:
        within = self.program.computations[body].values()
        return {int(i.operands[0]): i for i in within if i.op == "parameter"}

    def _written(self, body: str, fusion: Instruction) -> float:
        """Bytes that a fusion writes: of an array that is updated in place, what is new."""
        inner = self.program.computations[body]
        root = list(inner.values())[-1]
        roots = [inner.get(x) for x in root.operands] if root.op == "tuple" else [root]
        written, arrays = 0.0, fusion.arrays
        for array, made in zip(arrays, roots if len(roots) == len(arrays) else [None] * len(arrays), strict=True):
            while made is not None and made.op == "bitcast":
                made = inner.get(made.operands[0])
            if made is not None and made.op in _IN_PLACE:
                written += self._new(inner, made)
            else:
                written += self._main([array])
        return written


def _attribute(it: Instruction, pattern: str) -> str:
    found = re.search(pattern, it.attributes)
    return found[1] if found else ""


def _convolution(it: Instruction, left: Array, right: Array) -> float:
    """FLOP of a convolution without what meets padding, which is most of what TPUs make of batched products."""
    arrays = left, right, it.arrays[0]
    labels = re.split("_|->", _attribute(it, r"dim_labels=([\w>\-]+)"))
    lhs, rhs, out = (dict(zip(names, array.shape, strict=True)) for names, array in zip(labels, arrays, strict=True))
    work = 2.0 * out["b"] * out["f"] * rhs["i"]
    window = re.findall(r"(\w+)=([\dx_\-]+)", _attribute(it, r"window=\{([^}]*)\}"))
    for axis in (name for name in out if name.isdigit()):
        at = {key: values.split("x")[int(axis)] for key, values in window}
        stride, spread, step = (int(at.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        pad = int(at.get("pad", "0_0").split("_")[0])
        work *= _pairs(lhs[axis], rhs[axis], out[axis], stride, spread, step, pad)
    return work


@functools.cache
def _pairs(lhs: int, rhs: int, out: int, stride: int, spread: int, step: int, pad: int) -> int:
    """Products along one axis of a convolution."""
    places = (o * stride + k * step - pad for o in range(out) for k in range(rhs))
    return sum(at % spread == 0 and 0 <= at // spread < lhs for at in places)
