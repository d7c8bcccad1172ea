"""A second process that reports the end of a process which cannot report it itself.

In a run of several processes, JAX ends all others at once when the first one has ended: by SIGABRT (here exit code 6),
with a stack trace of C++, before any Python code can print a message. So each process has a witness, which waits for
its end and explains it in one line, unless it was dismissed before.
"""

import atexit
import os
import subprocess
import sys
from pathlib import Path

_CODE = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr, flush=True)"
_witnesses: list["subprocess.Popen[bytes]"] = []


def start() -> None:
    """Start the witness of this process."""
    message = (
        f"{Path(sys.argv[0]).name}: error: process {os.getpid()} was ended before it could report why: it was killed, "
        "or another process of the run has ended, as a message above may say; the same command for all continues after "
        "the last checkpoint"
    )
    # In a new session, so that signals from the terminal do not reach the witness.
    command = [sys.executable, "-c", _CODE, message]
    _witnesses.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
    atexit.register(dismiss)


def dismiss() -> None:
    """End the witness without a message: this process ends normally, or has reported why it ends."""
    while _witnesses:
        _witnesses.pop().communicate(b"ended")
