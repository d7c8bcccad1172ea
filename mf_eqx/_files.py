"""Files that are whole at any moment; files that others wrote, opened and read without trusting them; and what is
removed with what it holds."""

import contextlib
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_PIECE = 1 << 20

_PART = ".part"


def write_whole(path: str | Path, *pieces: bytes | memoryview) -> None:
    """Write a file, and the folders that it is in: under its name there is what was there before, or all of it.

    **Raises:** `ValueError` if there is a pipe, a device or the like under its name, which a rename would replace.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(_not_regular(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + _PART)
    try:
        with open(beside, "wb", opener=_open_at_once) as file:
            _check_regular(file, beside)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses power may keep the new name without the content
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def append(path: str | Path, content: bytes) -> None:
    """Write at the end of an ordinary file, new or old. **Raises:** as `open_regular` does."""
    with open(path, "ab", opener=_open_at_once) as file:
        _check_regular(file, path)
        file.write(content)


@contextlib.contextmanager
def open_regular(path: str | Path, most: int | None = None) -> Iterator[io.BufferedReader]:
    """An ordinary file to read, or a link to one. Opening never waits, as it would for who writes into a pipe.

    **Raises:** `OSError` with the file's name if it cannot be opened; `ValueError` if it is a pipe, a device or the
    like, or holds more than `most` bytes.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        size = _check_regular(file, path)
        if most is not None and size > most:
            raise ValueError(f"{path}: must hold at most {most:,} bytes, got {size:,}")
        yield file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _check_regular(file: IO[bytes], path: str | Path) -> int:
    """The size of a file, if it is an ordinary one."""
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(_not_regular(path))
    return found.st_size


def _not_regular(path: str | Path) -> str:
    return f"{path}: must be an ordinary file, got a pipe, a device or the like"


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """All of an ordinary file. **Raises:** as `open_regular` does."""
    with open_regular(path, most) as file:
        content = file.read() if most is None else read_up_to(file, most + 1)
    if most is not None and len(content) > most:  # it grew, or is one of those in /proc, which tell no length
        raise ValueError(f"{path}: must hold at most {most:,} bytes, got more")
    return bytes(content)


def read_up_to(file: io.BufferedIOBase, size: int) -> bytearray:
    """The next `size` bytes, fewer at the end of the file. Memory grows with what is there, not with what is asked."""
    content = bytearray()
    while piece := file.read(min(_PIECE, size - len(content))):
        content += piece
    return content


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of an ordinary file's content, in hexadecimal digits. **Raises:** as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; of a symbolic link, the link alone. Nothing if there is
    none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what `write_whole` left of files in a folder, and below, when its process was killed."""
    for path in folder.rglob(f"*{_PART}"):
        if path.is_file():
            path.unlink()
