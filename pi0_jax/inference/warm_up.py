"""Compiling and running ahead of a robot's calls."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pi0_jax.inference.sampler import ChunkSampler, Inputs
from pi0_jax.sampler import Sampler

_log = logging.getLogger(__name__)

SLOW = 1.0
"""Seconds of a call above which programs for shorter prompts, which are no slower, are not run."""


class Call(NamedTuple):
    """A call of the network."""

    name: str
    batch_size: int
    prompt_length: int
    inputs: Inputs
    write: bool
    """Whether it writes text first."""


def warm_up(chunks: ChunkSampler, sampler: Sampler, calls: Sequence[Call]) -> dict[int, float]:
    """Compiles the programs of calls, as many beside each other as there are cores, and then runs them.

    Args:
        chunks: whose programs they are.
        sampler: from noise to actions.
        calls: one per program.

    Returns:
        Seconds of a call by batch size, those of the slowest program.
    """
    _log.info("compiling %d programs", len(calls))
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [pool.submit(chunks.compiling(call.inputs, sampler, write=call.write)) for call in calls]
        for number, (call, program) in enumerate(zip(calls, compiled, strict=True), 1):
            program.result()
            after = time.perf_counter() - start
            _log.info("program %d of %d (%s): compiled after %.1f s", number, len(calls), call.name, after)
    found = {call.batch_size: 0.0 for call in calls}
    longest = max(call.prompt_length for call in calls)
    for call in sorted(calls, key=lambda call: -call.prompt_length):
        if call.prompt_length == longest or found[call.batch_size] < SLOW:
            seconds = _seconds(chunks, sampler, call)
            if seconds < SLOW:  # a first call does more than the next ones, which shows where they are quick
                seconds = _seconds(chunks, sampler, call)
            found[call.batch_size] = max(found[call.batch_size], seconds)
            _log.info("%s: runs in %.3g s", call.name, seconds)
    return found


def _seconds(chunks: ChunkSampler, sampler: Sampler, call: Call) -> float:
    start = time.perf_counter()
    (chunks.write if call.write else chunks)(call.inputs, sampler)
    return time.perf_counter() - start
