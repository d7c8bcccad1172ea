"""Many small tasks side by side.

XLA runs most of a small program on one core. So one program cannot use all cores of a machine, but several can, one per
thread.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

from jaxtyping import ArrayLike

from .._mean import Mean
from ._progress import Progress

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def in_parallel(
    function: Callable[[_Task], Generator[tuple[int, Mapping[str, Mean | ArrayLike]], None, _Result]],
    tasks: Sequence[_Task],
    *,
    workers: int,
    progress: Progress,
) -> Generator[tuple[_Task, _Result], None, None]:
    """The tasks with their results, in the order in which `workers` threads finish them.

    After an error in one task, or an interruption, the others end at their next `yield`.

    **Arguments:**

    - `function`: a function from a task to a generator that yields `(steps, metrics)` whenever it has done some steps,
      and returns the result. It cannot be stopped between two yields: yield about once a second.
    - `tasks`: they start in this order. If tasks compile the same program, put others between them: two threads that
      start them together would both compile it.
    - `workers`: the number of threads.
    - `progress`: counts the steps of all tasks.

    **Raises:** `ValueError` unless workers >= 1; any error of a task.
    """
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    stop, lock = threading.Event(), threading.Lock()
    finished = 0

    def work(task: _Task) -> _Result:
        nonlocal finished
        try:
            with contextlib.closing(function(task)) as parts:
                while not stop.is_set():
                    try:
                        steps, metrics = next(parts)
                    except StopIteration as end:
                        return end.value
                    with lock:
                        finished += steps
                        progress.update(finished, metrics)
        except BaseException:
            stop.set()
            raise
        raise concurrent.futures.CancelledError

    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in concurrent.futures.as_completed(futures):
            # Tasks that were stopped because of an error may complete before the task with the error.
            with contextlib.suppress(concurrent.futures.CancelledError):
                yield futures[future], future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
