"""Worker processes: a function of many argument tuples, started fresh, so that threads and devices are never copied.
And a thread for what is not needed yet."""

from __future__ import annotations

import collections
import concurrent.futures
import errno
import functools
import logging
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pi0_jax.errors import UserError, require_package

Result = TypeVar("Result")

AHEAD = 4
"""Tasks per worker that are done before the result of the first one is asked for."""
ATTEMPTS, WAIT = 3, 2.0
"""Times that a task is tried, and seconds before the second attempt."""
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENETDOWN, errno.EHOSTUNREACH)
"""Errors of storage that is far away."""

_log = logging.getLogger(__name__)


def run_tasks(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    workers: int | None = None,
    *,
    ray: bool = False,
) -> Iterator[Result]:
    """Results of `function(*task)`, in order; an error of a task is raised here and ends the others. However many tasks
    there are, at most `AHEAD` results per worker are kept.

    With more than one worker, a script that calls this needs the usual `if __name__ == "__main__":`. `function` is
    importable by name in another process, or a `functools.partial` of such a function; `workers` are processes, None:
    one per core; one, or a single task, runs in this process. `ray` hands the tasks to a Ray cluster instead, see
    `_with_ray`. A task that fails because storage does (`PASSING`) is tried `ATTEMPTS` times.

    Raises:
        UserError: Ray is not installed. And whatever `function` raises.
    """
    function = functools.partial(_tried_again, function)
    if ray:
        yield from _with_ray(function, tasks)
        return
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield function(*task)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        try:
            for task in tasks:
                if len(ahead) == AHEAD * workers:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(function, *task))
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _tried_again(function: Callable[..., Result], *task: Any) -> Result:
    """The result of a function that may fail for a while, as shared storage does under load."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*task)
        except (OSError, UserError) as error:
            if attempt == ATTEMPTS or not _passes(error):
                raise
            _log.warning("attempt %d of %d failed: %s", attempt, ATTEMPTS, error)
            time.sleep(WAIT * attempt)
    raise AssertionError


def _passes(error: BaseException | None) -> bool:
    """Whether what was the matter may be over soon, by the error or the one that it was raised from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and error.errno in PASSING


def _with_ray(function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Result]:
    """Results of tasks that Ray Data streams through a cluster, in order; without RAY_ADDRESS on this machine.

    At most some results per core are under way, so that memory does not grow with the number of tasks, and tasks of
    nodes that fail run elsewhere. The first argument of a task, a dataset, goes to each node once.
    """
    engine: Any = require_package("ray", "ray", "working on a cluster")
    data: Any = require_package("ray.data", "ray", "working on a cluster")
    if not tasks:
        return
    started = not engine.is_initialized()
    if started:
        cores = None if "RAY_ADDRESS" in os.environ else os.cpu_count()
        engine.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    shared = {key: engine.put(first) for key, first in {id(task[0]): task[0] for task in tasks}.items()}
    others = [(shared[id(task[0])], task[1:]) for task in tasks]
    try:
        items = data.from_items(list(range(len(tasks))), override_num_blocks=len(tasks))
        for row in items.map(functools.partial(_call, function, others)).iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield pickle.loads(row["result"])
    finally:
        if started:
            engine.shutdown()


def _call(
    function: Callable[..., Any], others: list[tuple[Any, tuple[Any, ...]]], row: dict[str, Any]
) -> dict[str, Any]:
    """Runs the task of a row of Ray Data."""
    engine: Any = require_package("ray", "ray")
    first, rest = others[row["item"]]
    try:
        return {"error": "", "result": pickle.dumps(function(engine.get(first), *rest))}
    except (OSError, UserError) as error:  # for the user, from whichever node it comes
        return {"error": str(error), "result": b""}


_ONE_BEHIND = threading.Lock()
BEHIND_AFTER = 5.0
"""Seconds for what is needed first, before what is not needed yet."""


def behind(function: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """The result to be of a function that runs in a thread of its own, one such at a time, `BEHIND_AFTER` seconds from
    now. Nobody waits for it when the program ends."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            time.sleep(BEHIND_AFTER)
            with _ONE_BEHIND:
                future.set_result(function())
        except Exception as error:  # for whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
