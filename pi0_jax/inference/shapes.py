"""Sizes of batches and lengths of prompts that programs are compiled for."""

from __future__ import annotations

from collections.abc import Sequence

from pi0_jax.errors import UserError


def check_batch_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes in order, each once.

    Raises:
        UserError: none, or some below 1.
    """
    if not sizes or min(sizes) < 1:
        raise UserError(f"batch sizes came as {list(sizes)}; expected at least one, of at least 1.")
    return tuple(sorted(set(sizes)))


def prompt_lengths(longest: int) -> tuple[int, ...]:
    """Lengths that prompts are padded to: 32, 64, 128, … and the model's own. Padding is masked and has no position, so
    the numbers are those of the longest."""
    lengths = []
    while (length := 32 << len(lengths)) < longest:
        lengths.append(length)
    return (*lengths, longest)
