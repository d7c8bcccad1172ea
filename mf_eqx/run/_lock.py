"""The lock of a run directory: two trainers in one directory would spoil each other's files.

It is the directory itself that is locked, and a file in it that says by whom: where the file is deleted, the lock
holds. Where a file system cannot lock directories (NFS), the lock of the file is all there is.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_held: dict[Path, int] = {}
"""Directories that this process holds the locks of, where they were then, each with its descriptor."""


class InUse(RuntimeError):
    """A run directory that another process trains in."""


class Moved(RuntimeError):
    """A run directory that is no longer where it was when its training began."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that holds the folder's lock. The system gives it back when the process ends, however it ends.

    **Raises:** `InUse` if another process holds it, with what it wrote about itself.
    """
    place = folder.absolute()
    with _opened(folder) as descriptor:
        with contextlib.suppress(OSError):
            _lock(descriptor, folder)
        with open(folder / ".lock", "a+", encoding="utf-8") as file:
            _lock(file.fileno(), folder)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            _held[place] = descriptor
            try:
                yield
            finally:
                del _held[place]


def check_in_place(folder: Path) -> None:
    """Refuses to write into a directory, or below one, that this process has locked and that was moved since.

    **Raises:** `Moved`.
    """
    below = folder.absolute()
    for place, descriptor in list(_held.items()):
        if below.is_relative_to(place) and not _is_at(place, descriptor):
            raise Moved(
                f"{place}: was moved or deleted while it was trained in; nothing more is written there. Move it back, "
                "and the same command continues after the last checkpoint"
            )


@contextlib.contextmanager
def in_place(folder: Path) -> Iterator[None]:
    """A context at whose end a locked folder must be where it was.

    **Raises:** `Moved` if it is not, in place of what could not be written because of that.
    """
    try:
        yield
    except Exception:
        check_in_place(folder)
        raise
    check_in_place(folder)


def _is_at(place: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(place), os.fstat(descriptor))
    except OSError:
        return False


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(f"{folder}: is in use by {_owner(folder)}; wait for it, or take another name") from None


def _owner(folder: Path) -> str:
    try:
        return (folder / ".lock").read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"
