"""The lock of a run directory: two trainers in one directory would overwrite each other's files.

Two things are locked: the directory itself, and a file in it that names the process. If the file is deleted, the lock
of the directory still holds. On a file system that cannot lock directories (NFS), only the file is locked.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_descriptors: dict[Path, int] = {}
"""The directories that this process has locked, by their paths at that time, each with its file descriptor."""


class InUse(RuntimeError):
    """A run directory that another process trains in."""


class Moved(RuntimeError):
    """A run directory that is no longer where it was when its training began."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that holds the folder's lock. The system releases it when the process ends, however it ends.

    **Raises:** `InUse` if another process holds it; the message names that process.
    """
    place = folder.absolute()
    with _open_descriptor(folder) as descriptor:
        with contextlib.suppress(OSError):
            _lock(descriptor, folder)
        with open(folder / ".lock", "a+", encoding="utf-8") as file:
            _lock(file.fileno(), folder)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            _descriptors[place] = descriptor
            try:
                yield
            finally:
                del _descriptors[place]


def check_in_place(folder: Path) -> None:
    """Refuses a folder that this process has locked, or that is below a locked one, if the locked one was moved since.

    **Raises:** `Moved`.
    """
    path = folder.absolute()
    for place, descriptor in list(_descriptors.items()):
        if path.is_relative_to(place) and not _is_at(place, descriptor):
            raise Moved(
                f"{place}: was moved or deleted while it was trained in; nothing more is written there. Move it back, "
                "and the same command continues after the last checkpoint"
            )


@contextlib.contextmanager
def in_place(folder: Path) -> Iterator[None]:
    """A context that checks at its end that a locked folder was not moved.

    **Raises:** `Moved` if it was moved, also in place of an error that this has caused.
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
def _open_descriptor(folder: Path) -> Iterator[int]:
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
