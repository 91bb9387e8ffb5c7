"""Worker processes: a function of many argument tuples, started fresh, so that threads and devices are never copied.
And a thread for what is not needed yet."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_tasks(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    workers: int | None = None,
    *,
    ordered: bool = False,
) -> Iterator[Result]:
    """Results of `function(*task)` as they come; an error of a task is raised here and ends the others.

    With more than one worker, a script that calls this needs the usual `if __name__ == "__main__":`. `function` is
    importable by name in another process, or a `functools.partial` of such a function; `workers` are processes, None:
    one per core; one, or a single task, runs in this process. `ordered` gives the results in the order of the tasks.
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield function(*task)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            for future in futures if ordered else concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


_ONE_BEHIND = threading.Lock()


def behind(function: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """The result to be of a function that runs in a thread of its own, one such at a time. Nobody waits for it when the
    program ends."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            with _ONE_BEHIND:
                future.set_result(function())
        except Exception as error:  # for whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
