"""Batching: gathers requests of many clients and computes them in threads of their own."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pi0_jax.serving.backend import Session
from pi0_jax.serving.metrics import Metrics
from pi0_jax.serving.settings import DEADLINE

log = logging.getLogger(__name__)


class Refused(Exception):
    """A request without an answer, for a reason that the client is told; `outcome` is one of `metrics.OUTCOMES`."""

    def __init__(self, outcome: str, message: str):
        super().__init__(message)
        self.outcome = outcome


@dataclasses.dataclass(eq=False)
class _Pending:
    observation: Any
    session: Session
    answer: asyncio.Future
    since: float


class Batcher:
    """Gathers requests into batches and computes them off the event loop.

    A batch starts when its oldest request has waited for `window` seconds, or earlier: when the largest compiled batch
    is full, or all of `clients` wait already, so that nobody else could join. While the policy is busy, the next batch
    gathers. Beyond `max_waiting` requests another is refused; one that is not answered within `deadline` seconds of its
    arrival, too.
    """

    def __init__(
        self,
        policy: Any,
        *,
        window: float,
        max_waiting: int,
        clients: Callable[[], int],
        metrics: Metrics,
    ):
        self._policy, self._window, self._max_waiting = policy, window, max_waiting
        self.deadline = DEADLINE
        """Seconds from a request's arrival to its answer."""
        self._clients, self._metrics = clients, metrics
        self._waiting: collections.deque[_Pending] = collections.deque()
        self._arrived = asyncio.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(policy.parallel, "inference")
        self._lock = threading.Lock()
        self.computing = 0
        """Requests being computed."""

    @property
    def waiting(self) -> int:
        """Number of requests that wait to be computed."""
        return len(self._waiting)

    async def infer(self, observation: Any, session: Session, since: float) -> dict[str, Any]:
        """The answer to a request that `validate` accepted and that arrived at `since` by `time.perf_counter`.

        It raises `Refused` (busy, late or not_finite), and what the policy raises.
        """
        if len(self._waiting) >= self._max_waiting:
            message = f"{len(self._waiting)} requests wait already, and that is the limit. Ask again in a moment."
            raise Refused("busy", message)
        item = _Pending(observation, session, asyncio.get_running_loop().create_future(), since)
        self._waiting.append(item)
        self._metrics.waiting.set(len(self._waiting))
        self._arrived.set()
        try:
            async with asyncio.timeout(self.deadline - (time.perf_counter() - since)):
                return await item.answer
        except TimeoutError:
            message = f"no answer within the deadline of {self.deadline:g} s. Ask again with a new one."
            raise Refused("late", message) from None
        finally:
            item.answer.cancel()
            with contextlib.suppress(ValueError):  # it is in a batch already
                self._waiting.remove(item)

    async def run(self) -> None:
        """Computes batches until cancelled."""
        free = asyncio.Semaphore(self._policy.parallel)
        async with asyncio.TaskGroup() as computations:
            while True:
                await free.acquire()
                batch = await self._next()
                computation = computations.create_task(self._compute(batch))
                computation.add_done_callback(lambda _: free.release())

    def close(self) -> None:
        """Releases the threads, without waiting for what they compute."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _next(self) -> list[_Pending]:
        """Waits until the next batch should start, and returns it."""
        batch: list[_Pending] = []
        while not batch:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            count = min(len(self._waiting), self._policy.batch_sizes[-1])
            batch = [item for item in (self._waiting.popleft() for _ in range(count)) if not item.answer.done()]
            self._metrics.waiting.set(len(self._waiting))
        return batch

    async def _gather(self) -> None:
        """Waits while others may still join the oldest request."""
        end = self._waiting[0].since + self._window
        while len(self._waiting) < min(self._policy.batch_sizes[-1], self._clients() - self.computing):
            timeout = end - time.perf_counter()
            if timeout <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except TimeoutError:
                return

    async def _compute(self, batch: list[_Pending]) -> None:
        """Computes a batch and distributes the answers. If it fails, each request is retried alone, which isolates
        failures."""
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        try:
            answers = await loop.run_in_executor(self._threads, self._call, batch)
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0].answer, error)
                return
            log.warning(
                "a batch of %d failed (%s: %s); each request is retried alone", len(batch), type(error).__name__, error
            )
            for item in batch:
                if not item.answer.done():
                    await self._compute([item])
            return
        seconds = time.perf_counter() - start
        self._metrics.count_batch(len(batch), seconds, [start - item.since for item in batch])
        for item, answer in zip(batch, answers, strict=True):
            timing = {"infer_ms": 1000 * seconds, "wait_ms": 1000 * (start - item.since)}
            _settle(item.answer, answer if isinstance(answer, Exception) else answer | {"server_timing": timing})

    def _call(self, batch: list[_Pending]) -> list[dict[str, Any] | Refused]:
        """In a thread: the policy's answers, with those that are not finite replaced by an error."""
        self._count(len(batch))
        try:
            answers = self._policy.infer_batch([item.observation for item in batch], [item.session for item in batch])
        finally:  # not in the event loop, where a task may be cancelled while the thread still computes
            self._count(-len(batch))
        if len(answers) != len(batch):
            raise RuntimeError(f"the policy gave {len(answers)} answers to {len(batch)} observations.")
        return [answer if np.isfinite(answer["actions"]).all() else _not_finite(answer) for answer in answers]

    def _count(self, change: int) -> None:
        with self._lock:
            self.computing += change


def _settle(answer: asyncio.Future, value: Any) -> None:
    if answer.done():
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)


def _not_finite(answer: dict[str, Any]) -> Refused:
    bad = int((~np.isfinite(answer["actions"])).sum())
    message = f"the policy's actions had {bad} values that are not finite. They are not sent; hold still."
    return Refused("not_finite", message)
