"""What threads of Orbax and TensorStore print about an error that we tell ourselves.

When a checkpoint cannot be written, Orbax logs the traceback of each of its threads and hands the error to us besides;
TensorStore's threads go on to call an event loop that is closed by then, and print that. Both is left out, and nothing
else: whatever is not exactly this is printed as ever.
"""

import functools
import logging
import sys
from typing import Any


@functools.cache
def leave_out() -> None:
    """From now on, in this process."""
    logging.getLogger("absl").addFilter(_is_news)
    shown = sys.unraisablehook
    sys.unraisablehook = lambda ignored: None if _is_late_call(ignored) else shown(ignored)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of a log is anything but Orbax's on an error of a thread, which `result()` raises too."""
    return not (record.exc_info and "_SignalingThread.run() raised" in str(record.msg))


def _is_late_call(ignored: Any) -> bool:
    """Whether an error that nobody can catch is an event loop's refusal of a call that came from no Python code."""
    error, traceback = ignored.exc_value, ignored.exc_traceback
    if traceback is None or not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
        return False
    return traceback.tb_frame.f_code.co_name.rpartition(".")[2] == "call_soon_threadsafe"  # asyncio's or uvloop's
