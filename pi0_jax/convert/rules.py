"""One table of rules between our leaves and foreign tensors, read in both directions.

A rule says which of our leaves is which of theirs and names the axes of theirs, in the letters of `leaves.py`. Going
through a table gives tensors that are read when asked, so tables are streams too. Everything is claimed: a leaf that no
tensor fills, a tensor that nothing uses, or a shape that differs stops the conversion with both sides' names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import einops
import numpy as np

from pi0_jax.convert.lazy import Index, Tensor, Tensors, entry_by_entry
from pi0_jax.convert.leaves import CONSTANT, Sizes, groups, shape_of


class Rule(NamedTuple):
    """One correspondence.

    Where `theirs` has `{l}` (or `{L}`), the first letter of `axes` is l (L), and each layer is a tensor of its own.
    Where it is two names, the next letter is c, and they are its two entries.
    """

    ours: str
    theirs: str | tuple[str, str]
    axes: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def layer(self) -> str | None:
        """The letter that names layers, or None where theirs are not split into layers."""
        found = re.search(r"\{(\w)\}", self.names[0])
        return found[1] if found else None

    @property
    def part_axes(self) -> str:
        """Axes of one of their tensors."""
        split = (self.layer is not None) + (len(self.names) > 1)
        return " ".join(_show(group) for group in groups(self.axes)[split:])

    def tensor_names(self, sizes: Sizes) -> Iterator[tuple[str, int | None, int | None]]:
        """Name of each of their tensors, with its layer and its part (None where there is one)."""
        for layer in range(sizes[self.layer]) if self.layer else (None,):
            for part, name in enumerate(self.names):
                name = name if layer is None else name.replace(f"{{{self.layer}}}", str(layer))
                yield name, layer, part if len(self.names) > 1 else None


ASK = {
    "n": "--num-heads (query heads of the experts; 8 in the released models)",
    "k": "--num-kv-heads (key/value heads of the experts; 1 in the released models)",
    "N": "--vision-heads (attention heads of the image encoder; 16 in the released models)",
}
"""Letters that a product of axes may leave open, and the flag that settles them."""


def infer_sizes(rules: Sequence[Rule], tensors: Mapping[str, Tensor], known: Sizes) -> Sizes:
    """Sizes of all letters that the tensors' shapes determine.

    Where tensors disagree, most of them decide; `bind` then names those that do not fit.

    Args:
        rules: the table; all its rules that apply to the tensors.
        tensors: the source.
        known: sizes that a product of axes leaves open, such as the number of heads.

    Raises:
        ValueError: a product of axes stays open; the message names the flags.
    """
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    products: list[tuple[list[str], int]] = []
    lookup = {name.replace(f"{{{rule.layer}}}", "{}"): rule for rule in rules for name in rule.names}
    for name, tensor in tensors.items():
        key = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        rule = lookup.get(key)
        if rule is None:
            continue
        if rule.layer:
            votes[rule.layer][1 + int(re.search(r"(?<=\.)\d+(?=\.)", name)[0])] += 1  # pyright: ignore[reportOptionalSubscript]
        axes = groups(rule.part_axes)
        if len(axes) != len(tensor.shape):
            continue
        for group, size in zip(axes, tensor.shape, strict=True):
            if len(group) == 1:
                votes[group[0]][size] += 1
            else:
                products.append((group, size))
    layered = {rule.layer for rule in rules if rule.layer}
    sizes = {letter: max(count) if letter in layered else count.most_common(1)[0][0] for letter, count in votes.items()}
    sizes |= {letter: size for letter, size in known.items() if letter not in sizes} | CONSTANT
    sizes = {letter: size for letter, size in sizes.items() if letter != "1"}
    while products:
        solved: defaultdict[str, Counter[int]] = defaultdict(Counter)
        left = []
        for group, size in products:
            open_letters = [letter for letter in group if letter not in sizes]
            rest = int(np.prod([sizes[letter] for letter in group if letter in sizes], dtype=np.int64))
            if len(open_letters) == 1 and size % rest == 0:
                solved[open_letters[0]][size // rest] += 1
            elif len(open_letters) > 1:
                left.append((group, size))
        if left and not solved:
            letters = sorted({letter for group, _ in left for letter in group if letter not in sizes and letter in ASK})
            raise ValueError(
                "the tensors give only products of these sizes; name them:\n  " + "\n  ".join(ASK[x] for x in letters)
            )
        sizes |= {letter: count.most_common(1)[0][0] for letter, count in solved.items()}
        products = left
    return sizes


def bind(
    rules: Sequence[Rule],
    leaves: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    sizes: Sizes,
    spare: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Rule], list[str]]:
    """Decides which rule fills each leaf, and checks that everything corresponds.

    Args:
        rules: the table; of several rules for a leaf the first one with a tensor in the source applies.
        leaves: our path to the letters of its axes: all that has to be filled.
        tensors: the source.
        sizes: of all letters.
        spare: names that may be left over, and the letters of their axes.

    Returns:
        The rule of each leaf, and the names that are left over.

    Raises:
        ValueError: a tensor that is missing, has another shape, or is of no use; all of them are listed.
    """
    chosen: dict[str, Rule] = {}
    problems, used = [], set()
    for path in leaves:
        candidates = [rule for rule in rules if rule.ours == path]
        if not candidates:
            problems.append(f"this format has no place for {path}")
            continue
        present = [r for r in candidates if any(name in tensors for name, *_ in r.tensor_names(sizes))]
        if not present and len(candidates) > 1:
            problems.append(f"missing: {' or '.join(str(r.theirs) for r in candidates)}, for {path}")
            continue
        rule = chosen[path] = (present or candidates)[0]
        want = shape_of(rule.part_axes, sizes)
        for name, *_ in rule.tensor_names(sizes):
            if name not in tensors:
                problems.append(f"missing: {name}, for {path}")
            elif tensors[name].shape != want:
                problems.append(f"{name} has shape {tensors[name].shape}, and {want} is needed for {path}")
            elif name in used:
                raise AssertionError(f"two rules claim {name}")
            used.add(name)
    rest = [name for name in tensors if name not in used]
    for name in rest:
        if name not in spare:
            problems.append(f"of no use: {name}")
        elif tensors[name].shape != (want := shape_of(spare[name], sizes)):
            problems.append(f"{name} has shape {tensors[name].shape}; it is not needed, and {want} is what it would be")
    if problems:
        if len(problems) > 40:
            problems = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", problem) for problem in problems))
        shown = "\n  ".join(problems[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise ValueError(f"these tensors do not make the model that most of them are of:\n  {shown}{more}")
    return chosen, rest


def to_ours(
    rules: Mapping[str, Rule], leaves: Mapping[str, str], tensors: Mapping[str, Tensor], sizes: Sizes
) -> Tensors:
    """Our leaves as tensors that are read from theirs."""
    return {path: _leaf(rules[path], axes, tensors, sizes) for path, axes in leaves.items()}


def from_ours(rules: Sequence[Rule], leaves: Mapping[str, str], ours: Mapping[str, Tensor], sizes: Sizes) -> Tensors:
    """Their tensors, read from our leaves. Where a table has several rules for a leaf, all are written.

    Raises:
        ValueError: the format has no place for a leaf; all such leaves are listed.
    """
    homeless = [path for path in leaves if not any(rule.ours == path for rule in rules)]
    if homeless:
        raise ValueError(
            "this format has no place for these of our parameters: " + ", ".join(homeless) + ". Image encoders with a "
            "stem exist only here; LoRA adapters can be merged with --merge-lora."
        )
    found: Tensors = {}
    for rule in rules:
        if rule.ours not in leaves:
            continue
        shape = shape_of(rule.part_axes, sizes)
        for name, layer, part in rule.tensor_names(sizes):
            found[name] = _part(rule, leaves[rule.ours], ours[rule.ours], layer, part, shape, sizes)
    return found


def _leaf(rule: Rule, axes: str, tensors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    names = [name for name, *_ in rule.tensor_names(sizes)]
    first, shape = tensors[names[0]], shape_of(axes, sizes)
    if rule.layer is None and rule.axes == axes:
        return first
    if groups(axes)[0][0] not in ("l", "L"):
        return _moved(first, rule.axes, axes, shape, sizes)

    def read_layer(i: int) -> np.ndarray:
        if rule.layer is None:
            array = first.read(i)
        else:
            parts = [tensors[name.replace(f"{{{rule.layer}}}", str(i))].read(None) for name in rule.names]
            array = np.stack(parts) if len(parts) > 1 else parts[0]
        return _move(array.astype(dtype, copy=False), _without_first(rule.axes), _without_first(axes), sizes)

    dtype = _holding({tensors[name].dtype for name in names})
    return entry_by_entry(shape, dtype, read_layer)


def _holding(dtypes: set[np.dtype]) -> np.dtype:
    """The one dtype of a leaf whose layers are tensors of these dtypes: one that holds all numbers exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if any(dtype.itemsize > 4 for dtype in dtypes) else np.float32)


def _part(
    rule: Rule,
    axes: str,
    leaf: Tensor,
    layer: int | None,
    part: int | None,
    shape: tuple[int, ...],
    sizes: Sizes,
) -> Tensor:
    if layer is None and rule.axes == axes:
        return leaf
    if layer is None and groups(axes)[0][0] not in ("l", "L"):
        return _moved(leaf, axes, rule.axes, shape, sizes)

    def read_layer(i: int) -> np.ndarray:
        array = _move(leaf.read(i), _without_first(axes), _without_first(rule.axes), sizes)
        return array if part is None else array[part]

    if layer is None:
        return entry_by_entry(shape, leaf.dtype, read_layer)
    return Tensor(shape, leaf.dtype, lambda i: read_layer(layer) if i is None else read_layer(layer)[i])


def _moved(tensor: Tensor, source: str, target: str, shape: tuple[int, ...], sizes: Sizes) -> Tensor:
    """The tensor with its axes rearranged, all at once."""

    def read(i: Index) -> np.ndarray:
        array = _move(tensor.read(None), source, target, sizes)
        return array if i is None else array[i]

    return Tensor(shape, tensor.dtype, read)


def _move(array: np.ndarray, source: str, target: str, sizes: Sizes) -> np.ndarray:
    """Rearranges axes. numpy's own bfloat16 is moved as integers of the same size, which einops knows."""
    if source == target:
        return array
    letters = {letter for group in groups(source) for letter in group if letter != "1"}
    moved = einops.rearrange(
        array.view(np.dtype(f"u{array.dtype.itemsize}")), f"{source} -> {target}", **{x: sizes[x] for x in letters}
    )
    return np.ascontiguousarray(moved).view(array.dtype)


def _without_first(axes: str) -> str:
    return " ".join(_show(group) for group in groups(axes)[1:])


def _show(group: list[str]) -> str:
    return group[0] if len(group) == 1 else f"({' '.join(group)})"
