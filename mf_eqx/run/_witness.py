"""A second process that speaks for one which can no longer speak for itself.

Of several processes, JAX ends all others at once when the first one is gone: by SIGABRT (here exit code 6), with a
stack trace of C++, before any Python code could say a word. So each has a witness, which waits for its end and, unless
it was dismissed before, says in one line what that means.
"""

import atexit
import os
import subprocess
import sys
from pathlib import Path

_CODE = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr, flush=True)"
_called: list["subprocess.Popen[bytes]"] = []


def call() -> None:
    """Have this process's end witnessed."""
    told = (
        f"{Path(sys.argv[0]).name}: error: process {os.getpid()} was ended before it could say why: it was killed, or "
        "another process of the run is gone, as a message above may say; the same command for all continues after the "
        "last checkpoint"
    )
    # A session of its own: signals to all that the terminal has started are not for the witness.
    command = [sys.executable, "-c", _CODE, told]
    _called.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
    atexit.register(dismiss)


def dismiss() -> None:
    """This process ends as it wants to, and has said why."""
    while _called:
        _called.pop().communicate(b"ended")
