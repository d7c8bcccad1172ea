"""Many small trainings side by side.

XLA leaves most of a small program to one core, so several of them, one per thread, fill a machine that one cannot.
"""

import concurrent.futures
import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
from jaxtyping import Array, ArrayLike, Key

from .._objective import Batch, Mean, Metrics
from .._train import scan_steps, TrainState, TrainStep
from ..checkpoint import Checkpoints
from ._progress import Progress
from ._train import NonFinite

_MOST_FAULTS = 10
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def scan_in_chunks(
    train_step: TrainStep,
    state: TrainState,
    draw: Callable[[Key[Array, ""]], Batch],
    steps: int,
    *,
    most: int = 250,
    checkpoints: Checkpoints | None = None,
    save_seconds: float = 30.0,
) -> Generator[tuple[int, Metrics], None, TrainState]:
    """A training by `mf_eqx.scan_steps` in parts, which yields `(steps, metrics)` after each: a task of `in_parallel`.

    **Arguments:** `train_step`, `state`, `draw` as of `scan_steps`; `steps` in all; `most` at once; `checkpoints` to
    continue from and to keep, about every `save_seconds` and at the end: the result is the same bit by bit.

    **Returns:** (`state = yield from scan_in_chunks(...)`) the last state.

    **Raises:** `ValueError` unless steps >= 0 and most >= 1, when it is first advanced; `NonFinite` where a part ends
    with ten steps in a row that had no finite loss and gradient.
    """
    if steps < 0 or most < 1:
        raise ValueError(f"steps must be >= 0 and most >= 1, got {steps} and {most}")
    # Equal parts but for the last: each other number of steps compiles a program of its own.
    size = math.ceil(steps / math.ceil(steps / most)) if steps else 1
    done, state = (0, state) if checkpoints is None else _newest(checkpoints, state)
    if done:
        yield done, {}
    saved = time.monotonic()
    for start in range(done, steps, size):
        number = min(size, steps - start)
        state, metrics = scan_steps(train_step, state, draw, number)
        yield number, jax.block_until_ready(metrics)
        _check_faults(state)
        if checkpoints is not None and (start + number == steps or time.monotonic() - saved > save_seconds):
            checkpoints.save(start + number, state)
            checkpoints.wait()
            saved = time.monotonic()
    return state


def _check_faults(state: TrainState) -> None:
    if (bad := int(state.faults.in_row)) >= _MOST_FAULTS:
        raise NonFinite(f"{bad} steps in a row, up to step {int(state.step)}, had no finite loss and gradient")


def _newest(checkpoints: Checkpoints, state: TrainState) -> tuple[int, TrainState]:
    """The newest good checkpoint, or the state as it is."""
    checkpoints.clean()
    restored = checkpoints.load(lambda: state)
    return (0, state) if restored is None else (restored.step, restored.state)


def in_parallel(
    function: Callable[[_Task], Generator[tuple[int, Mapping[str, Mean | ArrayLike]], None, _Result]],
    tasks: Sequence[_Task],
    *,
    workers: int,
    progress: Progress,
) -> Iterator[tuple[_Task, _Result]]:
    """The tasks with their results, as they are finished by so many threads.

    An error in one task, or an interruption, ends the others after what they do at the moment.

    **Arguments:**

    - `function`: from a task to a generator that yields `(steps, metrics)` whenever it has done some steps, and returns
      the result. Between two yields it cannot be stopped: yield every second or so.
    - `tasks`: started in this order. Put tasks that compile the same program apart, or two threads compile it at once.
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
            # What was stopped because of an error may come before the error.
            with contextlib.suppress(concurrent.futures.CancelledError):
                yield futures[future], future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
