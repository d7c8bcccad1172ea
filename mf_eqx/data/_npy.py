"""Arrays in .npy files, mapped into memory: a row is read from disk when it is used."""

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from .._files import open_regular
from .._validate import Count
from ._file import as_paths, name_of, PathLike
from ._source import AbstractSource, check_labels, Rows

NUMBERS = "biuf"
"""Kinds of dtypes that a .npy file may have here: booleans, signed and unsigned integers, floating point."""

LONGEST_HEADER = 1 << 16
"""The number of bytes that are read for a header; NumPy itself accepts headers of at most 10,000 bytes."""

_MOST_AXES = 32
_LONGEST_AXIS = (1 << 63) - 1


class NpySource(AbstractSource):
    """Rows in one .npy file, or in several files one after the other. All files stay open.

    Only headers and labels are read when the source is made. So it is unknown whether the data are finite until they
    are read.

    **Attributes:** those of every source, and `rows_per_file`.

    **Arguments:**

    - `x`: the path of a file of shape (rows, *data), or several paths with the same data shape and dtype, in the order
      of their rows.
    - `label`: likewise for integers of shape (rows,), one file for each file of `x`; or None.
    - `labels`: how many different labels there are, by default the largest one plus 1.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names the file, what was expected and what was
    found: not an ordinary file, not a .npy file, objects or text in it, Fortran order, a length that does not match its
    header, no rows, shapes or dtypes that differ between files, labels that do not fit.
    """

    def __init__(
        self,
        x: PathLike | Sequence[PathLike],
        label: PathLike | Sequence[PathLike] | None = None,
        *,
        labels: Count | None = None,
    ):
        paths = as_paths("x", x)
        self.name = name_of(paths)
        self._shards = [map_npy(path) for path in paths]
        for path, shard in zip(paths, self._shards, strict=True):
            _check_alike(path, shard, paths[0], self._shards[0])
        self.row_shape, self.dtype = self._shards[0].shape[1:], self._shards[0].dtype.newbyteorder("=")
        self.rows_per_file = [len(shard) for shard in self._shards]
        self._ends = np.cumsum(self.rows_per_file)
        if label is None and labels is not None:
            raise ValueError(f"{self.name}: label must be given with labels = {labels}, got None")
        self._label, self.labels = None, None
        if label is not None:
            self._label, self.labels = _read_labels(as_paths("label", label), paths, self._shards, labels)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x = np.empty((len(rows), *self.row_shape), self.dtype)
        file_of_row = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(file_of_row):
            shard, chosen = self._shards[number], file_of_row == number
            x[chosen] = shard[rows[chosen] - (self._ends[number] - len(shard))]
        return Rows(x, None if self._label is None else self._label[rows])


class Header(NamedTuple):
    """The header of an array in the format .npy; its values start at byte `offset`."""

    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype
    offset: int


def map_npy(path: Path) -> Shaped[np.ndarray, "rows ..."]:
    """The array of a .npy file, mapped into memory and read-only. **Raises:** as `NpySource`."""
    with open_regular(path) as file:
        header = parse_header(str(path), file.read(LONGEST_HEADER), os.fstat(file.fileno()).st_size)
        if not header.shape or min(header.shape) < 1:
            raise ValueError(f"{path}: must have at least one row and no empty axis, got shape {header.shape}")
        if header.columns_first and len(header.shape) > 1:
            raise ValueError(f"{path}: must hold one row after the other (C order), got Fortran order")
        return np.asarray(np.memmap(file, header.dtype, "r", header.offset, header.shape))


def parse_header(name: str, start: bytes, length: int) -> Header:
    """The header of an array of numbers in the format .npy, whose length must be that of its shape and dtype.

    **Arguments:** `name` of the array in error messages; `start` its first bytes, 64 KiB or all of them; `length` how
    many bytes it has.

    **Raises:** `ValueError`: no header, objects or text instead of numbers, an invalid shape, another length.
    """
    header = _evaluate(name, io.BytesIO(start))
    if header.dtype.kind not in NUMBERS:
        raise ValueError(f"{name}: must hold integers or floating point, got {header.dtype}")
    _check_shape(name, header.shape)
    wanted = header.offset + math.prod(header.shape) * header.dtype.itemsize
    if length != wanted:
        raise ValueError(
            f"{name}: must hold {wanted:,} bytes for shape {header.shape} of {header.dtype}, got {length:,}"
        )
    return header


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Refuses shapes that NumPy accepts in a header but cannot use: many axes, booleans, huge or negative sizes."""
    if len(shape) > _MOST_AXES:
        raise ValueError(f"{name}: must have at most {_MOST_AXES} axes, got {len(shape)}")
    for size in shape:
        if type(size) is not int or not 0 <= size <= _LONGEST_AXIS:
            # Python raises an error when an integer of thousands of digits is converted to text.
            found = size if size.bit_length() < 64 else f"one of {size.bit_length()} bits"
            raise ValueError(f"{name}: shape must be integers in [0, {_LONGEST_AXIS}], got {found}")


def _evaluate(name: str, start: io.BytesIO) -> Header:
    try:
        with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote
            version = np.lib.format.read_magic(start)
            # Version 3 exists only for field names that are not Latin-1, and arrays with fields are not allowed here.
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            return Header(*readers[version](start), start.tell())
    except Exception as error:  # numpy evaluates the header as a Python literal, which fails in many ways
        reason = f"version {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ValueError(f"{name}: must be an array in .npy format, got an unreadable header: {reason}") from error


def _check_alike(path: Path, shard: np.ndarray, first_path: Path, first: np.ndarray) -> None:
    if shard.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"{path}: must have rows of shape {first.shape[1:]} as {first_path} has, got {shard.shape[1:]}"
        )
    if shard.dtype != first.dtype:
        raise ValueError(f"{path}: must be {first.dtype} as {first_path} is, got {shard.dtype}")


def _read_labels(
    paths: list[Path], x_paths: list[Path], shards: list[np.ndarray], labels: Count | None
) -> tuple[Int[np.ndarray, " rows"], int]:
    """All labels, read into memory, and how many different labels there are."""
    if len(paths) != len(shards):
        raise ValueError(f"label must be {len(shards)} files, one for each of x, got {len(paths)}")
    parts = [map_npy(path) for path in paths]
    for path, part, x_path, shard in zip(paths, parts, x_paths, shards, strict=True):
        if part.shape != (len(shard),):
            raise ValueError(f"{path}: must have shape ({len(shard)},) for the rows of {x_path}, got {part.shape}")
    number = max(check_labels(str(path), part, len(part), labels) for path, part in zip(paths, parts, strict=True))
    return np.concatenate([part.astype(np.int32) for part in parts]), number
