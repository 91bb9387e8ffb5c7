"""How far a GPU's program hides what it sends: its schedule, played at the data sheet's rates.

The compiler orders kernels and collectives one after another. A kernel begins when the one before it ends. A
collective runs beside kernels, after the collectives before it, from where the program starts it to where the program
waits for it. Each takes what its bytes or its work take by the data sheet: latencies, and what a collective takes from
the kernels beside it, are left out.
"""

from __future__ import annotations

from typing import NamedTuple

from pi0_jax.flops import Device
from pi0_jax.plan.hlo import Program
from pi0_jax.plan.hlo_collectives import Collective, collective
from pi0_jax.plan.kernels import FREE, Counter


class Timeline(NamedTuple):
    """One run of a program, or of a part of it."""

    kernels: float = 0.0
    """Seconds of kernels."""
    products: float = 0.0
    """Seconds, of these, of kernels with matrix products."""
    network: float = 0.0
    """Seconds of collectives."""
    waited: float = 0.0
    """Seconds, of these, in which no kernel runs."""
    sent: float = 0.0
    """Bytes."""
    beside: float = 0.0
    """Bytes, of these, of collectives beside which products run."""

    def plus(self, other: Timeline, times: float = 1.0) -> Timeline:
        """This, and then another one so often."""
        return Timeline(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


class _Sending(NamedTuple):
    what: Collective
    ends: float
    products: float
    """Seconds of products before it started."""


def timeline(program: Program, device: Device, unknown_rounds: int | None = None) -> Timeline:
    """Plays a program that was compiled for a GPU.

    Args:
        program, device, unknown_rounds: as of `kernels.kernels`.
    """
    return _play(Counter(program, device, unknown_rounds), program.entry)


def _play(counter: Counter, name: str) -> Timeline:
    """Plays a computation; what it sends has ended when it ends."""
    all_so_far, network_free, sending = Timeline(), 0.0, {}
    for it in counter.program.computations[name].values():
        now = all_so_far.kernels + all_so_far.waited
        found = collective(it)
        if it.op == "while":
            all_so_far = all_so_far.plus(_play(counter, it.called[0]), counter.rounds(it))
        elif it.op == "conditional":  # the branch that takes longest
            all_so_far = all_so_far.plus(max(_play(counter, other) for other in it.called))
        elif it.op == "call":
            for other in it.called:
                all_so_far = all_so_far.plus(_play(counter, other))
        elif found is not None:
            seconds = found.seconds(counter.device)
            network_free = max(network_free, now) + seconds
            sending[it.name] = _Sending(found, network_free, all_so_far.products)
            all_so_far = all_so_far.plus(Timeline(network=seconds, sent=found.sent))
            if not it.op.endswith("-start"):
                all_so_far = all_so_far.plus(_wait(sending[it.name], all_so_far))
        elif it.op.endswith("-done") and it.operands[0] in sending:
            all_so_far = all_so_far.plus(_wait(sending[it.operands[0]], all_so_far))
        elif it.op not in FREE and not it.op.endswith("-start"):
            kernel = counter.kernel(name, it, 1.0)
            all_so_far = all_so_far.plus(Timeline(kernel.seconds, kernel.seconds if kernel.flops else 0.0))
    return all_so_far


def _wait(it: _Sending, so_far: Timeline) -> Timeline:
    waited = max(0.0, it.ends - so_far.kernels - so_far.waited)
    return Timeline(waited=waited, beside=it.what.sent if so_far.products > it.products else 0.0)
