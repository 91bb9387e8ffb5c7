"""Rules between our parameters and foreign tensors, read in both directions.

A rule says which of our parameters is which of theirs, and how the axes of theirs are arranged, by the names that the
network gives to ours. Rules turn lazy arrays into lazy arrays, so nothing is read before it is needed. Everything has
to correspond: a parameter that no tensor fills, a tensor that nothing uses, or a shape that differs stops the
conversion with both sides' names.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import einops
import numpy as np

from pi0_jax.convert.lazy import LazyArray, LazyArrays, computed, entry_by_entry
from pi0_jax.errors import UserError


class Parameter(NamedTuple):
    """One of our parameters."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical names, or `axis0`, `axis1`, …"""

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.shape, strict=True))


class Rule(NamedTuple):
    """One correspondence. Formats have some dozens of them, so what follows from one is computed once per process."""

    ours: str
    """Path of the parameter."""
    theirs: str | tuple[str, str]
    """Name of the tensor. With `{}` in it each layer is a tensor; two names are the two entries of our axis `stack`."""
    axes: str = ""
    """Axes of one of their tensors by our names, `(heads head_dim)` where two are one; empty: in our order."""

    @property
    @functools.cache  # noqa: B019
    def names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    @functools.cache  # noqa: B019
    def by_layer(self) -> bool:
        """Whether each layer is a tensor of its own."""
        return "{}" in self.names[0]

    @functools.cache  # noqa: B019
    def groups(self, parameter: Parameter) -> list[list[str]]:
        """Our axes by axis of one of their tensors."""
        if self.axes:
            return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", self.axes)]
        split = ("layers",) * self.by_layer + ("stack",) * (len(self.names) > 1)
        return [[axis] for axis in parameter.axes if axis not in split]

    @functools.cache  # noqa: B019
    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Shape of one of their tensors."""
        sizes = parameter.sizes
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups(parameter))

    @functools.cache  # noqa: B019
    def tensors(self, parameter: Parameter) -> tuple[tuple[str, int | None, int | None], ...]:
        """Name of each of their tensors, with its layer and its entry of `stack` (None where they are not split)."""
        return tuple(
            (name.replace("{}", str(layer)), layer, entry if len(self.names) > 1 else None)
            for layer in (range(parameter.sizes["layers"]) if self.by_layer else (None,))
            for entry, name in enumerate(self.names)
        )


def bind(
    rules: Sequence[Rule],
    wanted: Mapping[str, Parameter],
    tensors: Mapping[str, LazyArray],
    spare: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[dict[str, Rule], list[str]]:
    """Decides which rule fills each parameter, and checks that everything corresponds.

    Of several rules for a parameter the first one with a tensor in the checkpoint applies. `wanted` are our parameters,
    all of which have to be filled; `spare` gives names that may be left over, and their shapes.

    Returns:
        The rule of each parameter, and the names that are left over.

    Raises:
        UserError: a tensor that is missing, has another shape, or is unexpected; all of them are listed.
    """
    chosen: dict[str, Rule] = {}
    problems, used = [], set()
    for path, parameter in wanted.items():
        candidates = [rule for rule in rules if rule.ours == path]
        if not candidates:
            problems.append(f"this format has no place for {path}")
            continue
        present = [rule for rule in candidates if any(name in tensors for name, *_ in rule.tensors(parameter))]
        if not present and len(candidates) > 1:
            problems.append(f"missing: {' or '.join(str(rule.theirs) for rule in candidates)}, for {path}")
            continue
        rule = chosen[path] = (present or candidates)[0]
        shape = rule.shape(parameter)
        for name, *_ in rule.tensors(parameter):
            if name not in tensors:
                problems.append(f"missing: {name}, for {path}")
            elif tensors[name].shape != shape:
                problems.append(f"{name} has shape {tensors[name].shape}, and {shape} is needed for {path}")
            assert name not in used, f"two rules claim {name}"
            used.add(name)
    left_over = [name for name in tensors if name not in used]
    for name in left_over:
        if name not in spare:
            problems.append(f"unexpected: {name}")
        elif tensors[name].shape != spare[name]:
            problems.append(f"{name} has shape {tensors[name].shape}; unused as it is, it should have {spare[name]}")
    if problems:
        if len(problems) > 40:
            problems = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", problem) for problem in problems))
        shown = "\n  ".join(problems[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise UserError(f"the tensors do not match the inferred architecture:\n  {shown}{more}")
    return chosen, left_over


def to_ours(rules: Mapping[str, Rule], wanted: Mapping[str, Parameter], tensors: Mapping[str, LazyArray]) -> LazyArrays:
    """Our parameters, read from their tensors; `rules` as from `bind`."""
    return {path: _ours(rules[path], parameter, tensors) for path, parameter in wanted.items()}


def from_ours(rules: Sequence[Rule], wanted: Mapping[str, Parameter], ours: Mapping[str, LazyArray]) -> LazyArrays:
    """Their tensors, read from our parameters. Where there are several rules for a parameter, all are written."""
    homeless = [path for path in wanted if not any(rule.ours == path for rule in rules)]
    if homeless:
        raise UserError(
            "this format has no place for these of our parameters: " + ", ".join(homeless) + ". Image encoders with a "
            "stem exist only here; LoRA adapters can be merged with --merge-lora."
        )
    found: LazyArrays = {}
    for rule in rules:
        if parameter := wanted.get(rule.ours):
            for name, layer, entry in rule.tensors(parameter):
                found[name] = _theirs(rule, parameter, ours[rule.ours], layer, entry)
    return found


def _ours(rule: Rule, parameter: Parameter, tensors: Mapping[str, LazyArray]) -> LazyArray:
    names = [name for name, *_ in rule.tensors(parameter)]
    dtype = _common_dtype({tensors[name].dtype for name in names})
    source, target = rule.groups(parameter), [[axis] for axis in parameter.axes]
    if len(names) == 1:
        return _rearranged(tensors[names[0]], source, target, parameter)

    def read_layer(i: int) -> np.ndarray:
        arrays = [tensors[name.replace("{}", str(i))].read(None) for name in rule.names]
        if len(arrays) > 1:
            return _move(np.stack(arrays).astype(dtype, copy=False), [["stack"], *source], target[1:], parameter.sizes)
        return _move(arrays[0].astype(dtype, copy=False), source, target[1:], parameter.sizes)

    return entry_by_entry(parameter.shape, dtype, read_layer)


def _common_dtype(dtypes: set[np.dtype]) -> np.dtype:
    """One dtype that holds the numbers of all layers exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if any(dtype.itemsize > 4 for dtype in dtypes) else np.float32)


def _theirs(rule: Rule, parameter: Parameter, ours: LazyArray, layer: int | None, entry: int | None) -> LazyArray:
    source, target = [[axis] for axis in parameter.axes], rule.groups(parameter)
    if layer is None:
        return _rearranged(ours, source, target, parameter)
    if entry is not None:
        target = [["stack"], *target]

    def read() -> np.ndarray:
        array = _move(ours.read(layer), source[1:], target, parameter.sizes)
        return array if entry is None else array[entry]

    return computed(rule.shape(parameter), ours.dtype, read)


def _rearranged(array: LazyArray, source: list[list[str]], target: list[list[str]], parameter: Parameter) -> LazyArray:
    """The array with its axes in another order: layer by layer where both are stacked by layers, else as a whole."""
    if source == target:
        return array
    sizes = parameter.sizes
    shape = tuple(math.prod(sizes[axis] for axis in group) for group in target)
    if source[0] == target[0] == ["layers"]:
        return entry_by_entry(shape, array.dtype, lambda i: _move(array.read(i), source[1:], target[1:], sizes))
    return computed(shape, array.dtype, lambda: _move(array.read(None), source, target, sizes))


def _move(array: np.ndarray, source: list[list[str]], target: list[list[str]], sizes: Mapping[str, int]) -> np.ndarray:
    """Rearranges axes. numpy's own bfloat16 is moved as integers of the same size, which einops knows."""
    if source == target:
        return array
    before, after = (" ".join(f"({' '.join(group)})" for group in groups) for groups in (source, target))
    known = {axis: sizes[axis] for group in source for axis in group}
    moved = einops.rearrange(array.view(np.dtype(f"u{array.dtype.itemsize}")), f"{before} -> {after}", **known)
    return np.ascontiguousarray(moved).view(array.dtype)
