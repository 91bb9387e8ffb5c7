"""Summaries of many vectors that can be merged: mean, variance and range exactly, quantiles from a sample of rows.

A row gets a random number that depends on its identity alone, and the sample is the rows with the smallest numbers. So
the sample of a whole is the sample of its parts' samples: merged in any order and division, parts give exactly the
quantiles of the whole. Up to `SAMPLE` rows those are exact. Beyond, a quantile q is that of some rank q ± e, where e
has the standard deviation √(q (1 - q) / SAMPLE): for the 1 % quantile 0.02 %, and five times that, 0.1 %, is not
exceeded once in a million. Mean and variance of merged parts are exact up to rounding (Chan et al. 1983).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt64

SAMPLE = 2**18
"""Rows kept: 7 MB for 7 dimensions."""


class Sketch(NamedTuple):
    """Summary of rows of `d` numbers, float64."""

    count: int
    mean: Float[np.ndarray, "d"]
    variance: Float[np.ndarray, "d"]
    min: Float[np.ndarray, "d"]
    max: Float[np.ndarray, "d"]
    numbers: UInt64[np.ndarray, "s"]
    """Random numbers of the sampled rows."""
    sample: Float[np.ndarray, "s d"]

    def quantile(self, share: int | float) -> Float[np.ndarray, "d"]:
        """The value below which that share of the rows lies, for each dimension."""
        return np.quantile(self.sample.astype(np.float64), share, axis=0)


def summarise(values: Float[np.ndarray, "n d"], identity: UInt64[np.ndarray, "n"], size: int = SAMPLE) -> Sketch:
    """Summary of some rows, at least one.

    `identity` is a number for each row, different in all parts that will be merged.
    """
    x = values.astype(np.float64)
    numbers = scramble(identity)
    kept = _smallest(numbers, size)
    return Sketch(len(x), x.mean(0), x.var(0), x.min(0), x.max(0), numbers[kept], values[kept])


def merge(a: Sketch, b: Sketch, size: int = SAMPLE) -> Sketch:
    """Summary of the rows of both."""
    count = a.count + b.count
    share = b.count / count
    difference = b.mean - a.mean
    numbers = np.concatenate([a.numbers, b.numbers])
    kept = _smallest(numbers, size)
    return Sketch(
        count,
        a.mean + share * difference,
        (1 - share) * a.variance + share * b.variance + share * (1 - share) * difference**2,
        np.minimum(a.min, b.min),
        np.maximum(a.max, b.max),
        numbers[kept],
        np.concatenate([a.sample, b.sample])[kept],
    )


def scramble(numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Numbers that look random, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _smallest(numbers: np.ndarray, size: int) -> np.ndarray:
    """Where the `size` smallest numbers are, or all."""
    return np.arange(len(numbers)) if len(numbers) <= size else np.argpartition(numbers, size - 1)[:size]
