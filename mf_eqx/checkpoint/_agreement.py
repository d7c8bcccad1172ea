"""Agreement of all processes on which checkpoint they read: all of them use it, pass it over or refuse it."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


class Damage(Exception):
    """The checkpoint of one step is damaged; the message is the reason."""


@contextlib.contextmanager
def raising_everywhere() -> Iterator[None]:
    """A context that raises in all processes if it raises in one of them: if the processes did different things next,
    they would wait for each other for ever.

    **Raises:** in a process with an error, that error; in the other processes, `Damage` or `ValueError`. If different
    processes have errors of both types, `ValueError` in all of them.
    """
    error: Exception | None = None
    try:
        yield
    except (Damage, ValueError) as raised:
        error = raised
    verdict = 0 if error is None else 1 if isinstance(error, Damage) else 2
    if jax.process_count() > 1:
        verdict = int(multihost_utils.process_allgather(np.array(verdict)).max())
    if error is not None and (verdict == 2) == isinstance(error, ValueError):
        raise error
    if verdict:
        raise (
            ValueError("another process refuses the checkpoint")
            if verdict == 2
            else Damage("another process finds it damaged")
        )


def from_first_process(steps: list[int]) -> list[int]:
    """The steps that the first process sees: a directory's contents may differ between machines for a while."""
    if jax.process_count() == 1:
        return steps
    number = int(multihost_utils.broadcast_one_to_all(np.array(len(steps))))
    mine = np.zeros(number, np.int64)
    mine[: len(steps[:number])] = steps[:number]
    return multihost_utils.broadcast_one_to_all(mine).tolist()
