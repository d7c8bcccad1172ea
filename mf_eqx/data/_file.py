"""Files from other programs: how they are named in messages, and how they are opened and read without trusting them."""

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from .._files import open_regular

PathLike: TypeAlias = str | os.PathLike[str]

_GZIP = b"\x1f\x8b"
_MOST_DEFLATED = 1032
"""Unpacking one byte of deflated data never gives more bytes than this."""


def as_paths(argument: str, paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """One path or several as a list. **Raises:** `ValueError` that names `argument` if there is no path."""
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not several:
        raise ValueError(f"{argument} must be at least one path, got none")
    return [Path(path) for path in several]


def printable(name: str) -> str:
    """A name in the file system, with escapes for bytes that are no UTF-8, which can be neither printed nor drawn."""
    return name.encode("utf-8", "backslashreplace").decode()


def name_of(paths: Sequence[Path]) -> str:
    """The name of all these files together in error messages."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


@contextlib.contextmanager
def open_unpacked(path: Path, most: int | None = None) -> Iterator[io.BufferedIOBase]:
    """An ordinary file, unpacked while it is read if its first bytes are those of gzip, whatever its name.

    **Raises:** as `open_regular`, where `most` limits the bytes before unpacking; inside the context, `ValueError` if
    gzip data are damaged.
    """
    with open_regular(path, most) as raw:
        packed = raw.read(len(_GZIP)) == _GZIP
        raw.seek(0)
        try:
            with gzip.GzipFile(fileobj=raw) if packed else contextlib.nullcontext(raw) as file:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: must be a whole gzip file, got: {error}") from error


def most_unpacked(path: Path) -> int:
    """An upper bound on the length of a file's content, whether it is gzipped or not."""
    return _MOST_DEFLATED * path.stat().st_size
