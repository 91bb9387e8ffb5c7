"""Requests of many clients, gathered into batches and computed in threads of their own."""

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

from pi0_jax.serving.metrics import Metrics
from pi0_jax.serving.session import Session

log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that gets no actions, through no fault of the policy; the client is told the message.

    Attributes:
        outcome: the word for it in metrics and logs.
    """

    outcome = "invalid"


class Busy(Refused):
    """Too many requests wait already."""

    outcome = "busy"


class Late(Refused):
    """There was no answer before the deadline."""

    outcome = "late"


class Stopping(Refused):
    """The server is going down."""

    outcome = "stopping"


class NotFinite(Refused):
    """The policy's actions were not finite."""

    outcome = "not_finite"


@dataclasses.dataclass(eq=False)
class _Waiting:
    observation: Any
    session: Session
    answer: asyncio.Future
    since: float


class Batcher:
    """Gathers requests and has them computed, off the event loop.

    A batch starts when its oldest request has waited for the window, or earlier: when the largest compiled batch is
    full, or every client waits already, so that nobody else could join. While the policy computes all that it can at
    once, the next gathers.

    Args:
        policy: a `Served`.
        window: seconds a request may wait for others to join it.
        max_waiting: requests that may wait; one more is refused.
        deadline: seconds from a request's arrival within which it is answered or refused.
        clients: how many clients there are.
        metrics: where times and sizes are counted.
    """

    def __init__(
        self,
        policy: Any,
        *,
        window: float,
        max_waiting: int,
        deadline: float,
        clients: Callable[[], int],
        metrics: Metrics,
    ):
        self._policy, self._window, self._max_waiting, self._deadline = policy, window, max_waiting, deadline
        self._clients, self._metrics = clients, metrics
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._came = asyncio.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(policy.parallel, "inference")
        self._lock = threading.Lock()
        self.computing = 0
        """Requests that are computed now."""

    @property
    def waiting(self) -> int:
        """How many requests wait to be computed."""
        return len(self._waiting)

    async def infer(self, observation: Any, session: Session, since: float) -> dict[str, Any]:
        """The answer to one prepared request.

        Args:
            observation: what the policy's `prepare` returned.
            session: its client's.
            since: when the request came, by `time.perf_counter`.

        Raises:
            Busy, Late, NotFinite: there are no actions; see there.
            Exception: whatever the policy raised.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Busy(f"{len(self._waiting)} requests wait already, and that is the limit. Ask again in a moment.")
        item = _Waiting(observation, session, asyncio.get_running_loop().create_future(), since)
        self._waiting.append(item)
        self._metrics.waiting.set(len(self._waiting))
        self._came.set()
        try:
            async with asyncio.timeout(self._deadline - (time.perf_counter() - since)):
                return await item.answer
        except TimeoutError:
            raise Late(f"no answer within the deadline of {self._deadline:g} s. Ask again with a new one.") from None
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
        """Lets go of the threads, without waiting for what they compute."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _next(self) -> list[_Waiting]:
        """The next batch, as soon as it should start."""
        batch: list[_Waiting] = []
        while not batch:
            while not self._waiting:
                self._came.clear()
                await self._came.wait()
            await self._gather()
            count = min(len(self._waiting), self._policy.batch_sizes[-1])
            batch = [item for item in (self._waiting.popleft() for _ in range(count)) if not item.answer.done()]
            self._metrics.waiting.set(len(self._waiting))
        return batch

    async def _gather(self) -> None:
        """Returns when the oldest request should wait no longer."""
        end = self._waiting[0].since + self._window
        while len(self._waiting) < min(self._policy.batch_sizes[-1], self._clients() - self.computing):
            left = end - time.perf_counter()
            if left <= 0:
                return
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except TimeoutError:
                return

    async def _compute(self, batch: list[_Waiting]) -> None:
        """Has a batch computed and hands out the answers. If it fails, each is tried alone: the fault of one request
        shall not be the others'."""
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        try:
            answers = await loop.run_in_executor(self._threads, self._call, batch)
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0].answer, error)
                return
            log.warning("a batch of %d failed (%s: %s); each is tried alone", len(batch), type(error).__name__, error)
            for item in batch:
                if not item.answer.done():
                    await self._compute([item])
            return
        seconds = time.perf_counter() - start
        self._metrics.saw_batch(len(batch), seconds, [start - item.since for item in batch])
        for item, answer in zip(batch, answers, strict=True):
            timing = {"infer_ms": 1000 * seconds, "wait_ms": 1000 * (start - item.since)}
            _settle(item.answer, answer if isinstance(answer, Exception) else answer | {"server_timing": timing})

    def _call(self, batch: list[_Waiting]) -> list[dict[str, Any] | NotFinite]:
        """In a thread: the policy's answers, checked."""
        self._count(len(batch))
        try:
            answers = self._policy.infer_batch([item.observation for item in batch], [item.session for item in batch])
        finally:  # not in the event loop, where a cancelled task would forget what the thread still does
            self._count(-len(batch))
        if len(answers) != len(batch):
            raise RuntimeError(f"the policy gave {len(answers)} answers to {len(batch)} observations.")
        return [answer if np.isfinite(answer["actions"]).all() else _not_finite(answer) for answer in answers]

    def _count(self, more: int) -> None:
        with self._lock:
            self.computing += more


def _settle(answer: asyncio.Future, value: Any) -> None:
    if answer.done():
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)


def _not_finite(answer: dict[str, Any]) -> NotFinite:
    bad = int((~np.isfinite(answer["actions"])).sum())
    return NotFinite(f"the policy's actions had {bad} values that are not finite. They are not sent; hold still.")
