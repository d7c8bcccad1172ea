"""The lock of a run directory: two trainers in one directory would spoil each other's files."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path


class InUse(RuntimeError):
    """A run directory that another process trains in."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that holds the folder's lock. The system gives it back when the process ends, however it ends.

    **Raises:** `InUse` if another process holds it, with what it wrote about itself.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise InUse(f"{folder}: is in use by {owner}; wait for it, or take another name") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
