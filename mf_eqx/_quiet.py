"""Orbax without its messages."""

import contextlib
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

_LOCK = threading.Lock()
_READ_FAILED = threading.Event()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without log lines and warnings from the libraries that read: the only report of a failure is that of
    the caller, which calls `collect_tasks` in this context if a read failed. One thread at a time."""
    with _LOCK:
        yield from _without_messages()


def collect_tasks() -> None:
    """Delete the tasks of asyncio that a failed read left, now and at the end of the next read, since some may still
    run: asyncio writes a report when they are deleted, wherever that is. The error holds some of them, so it must have
    been handled."""
    gc.collect()
    _READ_FAILED.set()


def _without_messages() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    try:
        sys.unraisablehook = lambda _: None
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            follows_failure = _READ_FAILED.is_set()
            _READ_FAILED.clear()
            try:
                yield
            except BaseException:
                collect_tasks()
                raise
            finally:
                if follows_failure:
                    gc.collect()
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
