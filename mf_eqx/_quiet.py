"""Orbax without its messages."""

import contextlib
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

_LOCK = threading.Lock()
_FAILED = threading.Event()
"""Set from a read that failed until the end of the next one that did not."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without log lines and warnings from the libraries that read: the only report of a failure is that of
    the caller. One thread at a time."""
    with _LOCK:
        yield from _without_messages()


def _without_messages() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    try:
        sys.unraisablehook = lambda _: None
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except BaseException:
                _FAILED.set()
                raise
            finally:
                # asyncio reports the tasks that a failed read abandoned when they are collected: here, not later. The
                # error itself holds some of them until it is handled, so they are collected after the next read.
                if _FAILED.is_set():
                    gc.collect()
            _FAILED.clear()
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
