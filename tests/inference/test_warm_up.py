"""Which programs are compiled and run ahead of a robot's calls."""

import time
from typing import Any

import pytest

from pi0_jax.inference import warm_up as module
from pi0_jax.inference.sampler import ChunkSampler
from pi0_jax.inference.warm_up import Call, warm_up
from pi0_jax.sampler import Euler


class Chunks(ChunkSampler):
    """Programs that take a given time."""

    def __init__(self, seconds: float):
        self.seconds, self.compiled, self.ran = seconds, [], []

    def compiling(self, inputs, sampler, *, write):
        return lambda: self.compiled.append(inputs)

    def __call__(self, inputs, sampler):
        time.sleep(self.seconds * inputs[0])
        self.ran.append(inputs)

    write = __call__


def calls() -> Any:
    return [Call(f"{n} x {length}", n, length, (n, length), False) for n in (1, 2) for length in (32, 64)]


LONG, SHORT = [(1, 64)] * 2 + [(2, 64)] * 2, [(1, 32)] * 2 + [(2, 32)] * 2
"""Quick calls are made twice."""


@pytest.mark.parametrize(("slow", "ran"), [(1.0, LONG + SHORT), (0.0, LONG[::2])])
def test_all_are_compiled_and_slow_ones_run_with_the_longest_prompt_alone(monkeypatch, slow, ran):
    monkeypatch.setattr(module, "SLOW", slow)
    chunks: Any = Chunks(0.01)
    seconds = warm_up(chunks, Euler(), calls())
    assert sorted(chunks.compiled) == [(1, 32), (1, 64), (2, 32), (2, 64)]
    assert chunks.ran == ran
    assert seconds[1] >= 0.01
    assert seconds[2] >= 0.02


def test_what_a_compiler_refuses_is_raised():
    def refused(*args, **kwargs):
        raise RuntimeError("no room")

    chunks: Any = Chunks(0.0)
    chunks.compiling = lambda *args, **kwargs: refused
    with pytest.raises(RuntimeError, match="no room"):
        warm_up(chunks, Euler(), calls())
