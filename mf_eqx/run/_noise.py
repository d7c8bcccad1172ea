"""Suppression of messages of Orbax's and TensorStore's threads about an error that is reported here anyway.

When a checkpoint cannot be written, Orbax logs the traceback of each of its threads, and raises the error as well;
TensorStore's threads then call an event loop that is already closed, and print the error of this call. Exactly these
two messages are suppressed; all others are printed as usual.
"""

import functools
import logging
import sys
from typing import Any


@functools.cache
def suppress_noise() -> None:
    """Suppress these messages from now on, in this process."""
    logging.getLogger("absl").addFilter(_is_to_be_logged)
    print_error = sys.unraisablehook
    sys.unraisablehook = lambda error: None if _is_late_call(error) else print_error(error)


def _is_to_be_logged(record: logging.LogRecord) -> bool:
    """False for Orbax's records of an error in a thread, which `result()` raises too; True for all others."""
    return not (record.exc_info and "_SignalingThread.run() raised" in str(record.msg))


def _is_late_call(unraisable: Any) -> bool:
    """Whether an unraisable error is that of a closed event loop which was called from outside of Python."""
    error, traceback = unraisable.exc_value, unraisable.exc_traceback
    if traceback is None or not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
        return False
    return traceback.tb_frame.f_code.co_name.rpartition(".")[2] == "call_soon_threadsafe"  # asyncio's or uvloop's
