"""Files and directories: written atomically, read without trust in their source, and removed with their contents."""

import contextlib
import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

_READ_BYTES = 1 << 20

_TEMPORARY_SUFFIX = ".part"
_MOST_NAME_BYTES = 255


def write_whole(path: str | Path, *pieces: bytes | memoryview) -> None:
    """Write a file, and make its parent folders. At any moment its path holds the old content or all of the new one,
    also if several processes write it at once.

    **Raises:** as `whole_file` does.
    """
    with whole_file(path) as file:
        for piece in pieces:
            file.write(piece)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A context with a file to write, as by `write_whole`: what was written gets its path at the end, and is removed
    after an error.

    **Raises:** `ValueError` if the path is a pipe, a device or the like, which a rename would replace; `OSError` that
    names the file, or the temporary one beside it, if it cannot be written or no space is left.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(_not_regular(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_name(path.name))
    try:
        with named_in_errors(path), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a loss of power may keep the new name without the content
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary_name(name: str) -> str:
    """A name that no other process uses, so that two of them may write the same file: the later one replaces it. It has
    at most as many bytes as file systems allow."""
    ending = f".{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
    return os.fsencode(name)[: _MOST_NAME_BYTES - len(ending)].decode(errors="ignore") + ending


def save_array(path: str | Path, array: np.ndarray) -> None:
    """Write an array as a .npy file. **Raises:** as `write_whole` does; `ValueError` for arrays of Python objects."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_whole(path, content.getbuffer())


def check_writable(path: str | Path) -> None:
    """Raises an `OSError` that names the path if a file could not be written. Call it before a long computation, so
    that the error does not come after it.

    The folder must be writable, too, since `write_whole` writes a temporary file beside the path. Folders that are
    missing can be made.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(found for found in path.parents if found.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    for needed in (path, folder):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(needed))


def append(path: str | Path, content: bytes) -> None:
    """Append to an ordinary file, which may be new. **Raises:** as `open_regular` does; `OSError` with the file's name
    if no space is left."""
    with named_in_errors(path), open(path, "ab", opener=_open_without_waiting) as file:
        _check_regular(file, path)
        file.write(content)


@contextlib.contextmanager
def named_in_errors(path: str | Path) -> Iterator[None]:
    """Gives this file's name to an `OSError` without one: a write raises such an error if no space is left."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else the name would take the place of the message
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def open_regular(path: str | Path, max_bytes: int | None = None) -> Iterator[io.BufferedReader]:
    """An ordinary file, or a link to one, opened for reading. Opening never waits, as it would for a pipe.

    **Raises:** `OSError` with the file's name if it cannot be opened; `ValueError` if it is a pipe, a device or the
    like, or has more than `max_bytes` bytes.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        size = _check_regular(file, path)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{path}: must hold at most {max_bytes:,} bytes, got {size:,}")
        yield file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _check_regular(file: IO[bytes], path: str | Path) -> int:
    """The size of a file. **Raises:** `ValueError` if it is not an ordinary file."""
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(_not_regular(path))
    return status.st_size


def _not_regular(path: str | Path) -> str:
    return f"{path}: must be an ordinary file, got a pipe, a device or the like"


def read_regular(path: str | Path, max_bytes: int | None = None) -> bytes:
    """All of an ordinary file. **Raises:** as `open_regular` does."""
    with open_regular(path, max_bytes) as file:
        content = file.read() if max_bytes is None else read_up_to(file, max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:  # it grew, or is in /proc, whose files report no size
        raise ValueError(f"{path}: must hold at most {max_bytes:,} bytes, got more")
    return bytes(content)


def read_up_to(file: io.BufferedIOBase, size: int) -> bytearray:
    """The next `size` bytes, fewer at the end of the file. Memory grows with the bytes read, not with `size`."""
    content = bytearray()
    while piece := file.read(min(_READ_BYTES, size - len(content))):
        content += piece
    return content


def irregular_files(folder: Path) -> list[str]:
    """Paths in a folder, at any depth, that are neither ordinary files nor folders. For example, Orbax would wait for a
    pipe for ever."""
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return [str(path.relative_to(folder)) for path in paths if path.exists() and not path.is_file()]


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of an ordinary file's content, in hexadecimal digits. **Raises:** as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file, or a directory with its contents; of a symbolic link, only the link. A path that does not exist is
    no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that `write_whole` left in a folder and its subfolders when its process was killed."""
    for path in folder.rglob(f"*{_TEMPORARY_SUFFIX}"):
        if path.is_file():
            path.unlink()
