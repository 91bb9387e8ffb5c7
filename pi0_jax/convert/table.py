"""Renames and reshapes parameters between two layouts by a table of rules.

A rule says which of our leaves is which of theirs, and how the axes move. Everything is claimed: a target leaf that no
source tensor fills, or a source tensor that nothing uses, stops the conversion with both lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import einops


class Rule(NamedTuple):
    """One correspondence between leaves, paths joined by "/"."""

    ours: str
    theirs: str
    pattern: str = ""
    """einops rearrangement of our axes into theirs; empty where they are the same."""


def convert_in(rules: Sequence[Rule], source: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """Fills our leaves from foreign tensors.

    Args:
        rules: the table; where several rules name one of our leaves, the one whose tensor exists applies.
        source: foreign path to array.
        target: our path to anything with a `shape`: what has to be filled.

    Returns:
        Our path to array, of the source's dtype.

    Raises:
        ValueError: a leaf without tensor, a tensor without use, or a shape that differs; all of them are listed.
    """
    filled, used, problems = {}, set(), []
    for rule in rules:
        if rule.ours not in target or rule.theirs not in source:
            continue
        if rule.ours in filled or rule.theirs in used:
            raise AssertionError(f"two rules claim {rule.ours} or {rule.theirs}")
        value = source[rule.theirs]
        if rule.pattern:
            left, right = rule.pattern.split("->")
            value = einops.rearrange(value, f"{right} -> {left}")
        if value.shape != target[rule.ours].shape:
            problems.append(f"{rule.theirs} gives {rule.ours} shape {value.shape}, needs {target[rule.ours].shape}")
        filled[rule.ours] = value
        used.add(rule.theirs)
    problems += [f"nothing in the source for {path}" for path in target if path not in filled]
    problems += [f"no use for the source's {path}" for path in source if path not in used]
    if problems:
        shown = "\n  ".join(problems[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise ValueError(
            f"these weights do not fit the model:\n  {shown}{more}\n"
            "Check the model's variant (pi0 or pi05) and sizes against the checkpoint's."
        )
    return filled
