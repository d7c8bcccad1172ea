"""Files that others wrote: how they are named in messages, opened and read without trusting them."""

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
"""Deflate never makes more than this many bytes of one."""


def as_paths(argument: str, paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """One path or several as a list. **Raises:** `ValueError` that names `argument` if there is none."""
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not several:
        raise ValueError(f"{argument} must be at least one path, got none")
    return [Path(path) for path in several]


def name_of(paths: Sequence[Path]) -> str:
    """What messages call all these files together."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


@contextlib.contextmanager
def open_unpacked(path: Path, most: int | None = None) -> Iterator[io.BufferedIOBase]:
    """An ordinary file's content, unpacked if the first bytes are those of gzip, whatever its name.

    **Raises:** as `open_regular` does, with `most` for the bytes before unpacking; inside, `ValueError` if gzip data
    are damaged.
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
    """A bound on the length of a file's content, be it gzipped or not."""
    return _MOST_DEFLATED * path.stat().st_size
