"""Arrays in .npy files, mapped into memory: a row is read from disk when it is used."""

import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PyTree, Shaped

from .._files import open_regular
from .._leaves import by_name
from .._validate import Count
from ._file import as_paths, name_of, PathLike
from ._source import AbstractSource, count_labels, Rows

NUMBERS = "biuf"
"""Kinds of dtypes that a .npy file may have here: booleans, signed and unsigned integers, floating point."""

LONGEST_HEADER = 1 << 16
"""The number of bytes that are read for a header; NumPy itself accepts headers of at most 10,000 bytes."""

_MOST_AXES = 32
_LONGEST_AXIS = (1 << 63) - 1


class NpySource(AbstractSource):
    """Rows in one .npy file, or in several files one after the other. All files stay open:
    a file that is overwritten in the meantime gives other rows, or none, without an error.

    Only headers and labels are read when the source is made. So it is unknown whether the data are finite until they
    are read.

    **Attributes:** those of every source, and `rows_per_file`.

    **Arguments:**

    - `x`: the path of a file of shape (rows, *data), or several paths with the same data shape and dtype, in the order
      of their rows.
    - `label`: likewise for integers of shape (rows,), one file for each file of `x`; or None.
    - `condition`: what a field is conditioned on if it is no label: a PyTree of paths, each of a file with a row for
      each row of `x`. If `x` is several files, a list of as many PyTrees of the same structure. None if there is no
      such condition.
    - `labels`: how many different labels there are, by default the largest one plus 1.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names the file, what was expected and what was
    found: not an ordinary file, not a .npy file, objects or text in it, Fortran order, a length that does not match its
    header, no rows, shapes or dtypes that differ between files, labels or conditions that do not fit.
    """

    def __init__(
        self,
        x: PathLike | Sequence[PathLike],
        label: PathLike | Sequence[PathLike] | None = None,
        *,
        condition: PyTree[Any] = None,
        labels: Count | None = None,
    ):
        paths = as_paths("x", x)
        self.name, self._x = name_of(paths), _Files(paths)
        self.row_shape, self.dtype, self.rows_per_file = self._x.row_shape, self._x.dtype, self._x.rows_per_file
        if label is None and labels is not None:
            raise ValueError(f"{self.name}: label must be given with labels = {labels}, got None")
        if label is not None and condition is not None:
            raise ValueError(f"{self.name}: label must be None with a condition, got both")
        self._label, self.labels = None, None
        if label is not None:
            self._label, self.labels = _read_labels(as_paths("label", label), self._x, labels)
        several = condition if condition is None or not isinstance(x, str | os.PathLike) else [condition]
        self._condition = None if several is None else _map_conditions(several, self._x)
        self.row_condition = jax.tree.map(
            lambda files: jax.ShapeDtypeStruct(files.row_shape, files.dtype), self._condition
        )

    def __len__(self) -> int:
        return len(self._x)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        condition = jax.tree.map(lambda files: files.take(rows), self._condition)
        return Rows(self._x.take(rows), None if self._label is None else self._label[rows], condition)


class _Files:
    """One array whose rows are in several .npy files, one file after the other, mapped into memory."""

    def __init__(self, paths: list[Path]):
        self.paths, self.shards = paths, [map_npy(path) for path in paths]
        for path, shard in zip(paths, self.shards, strict=True):
            _check_alike(path, shard, paths[0], self.shards[0])
        self.row_shape, self.dtype = self.shards[0].shape[1:], self.shards[0].dtype.newbyteorder("=")
        self.rows_per_file = [len(shard) for shard in self.shards]
        self._ends = np.cumsum(self.rows_per_file)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: Int[np.ndarray, " rows"]) -> Shaped[np.ndarray, "rows ..."]:
        """The rows with these numbers, in native byte order."""
        taken = np.empty((len(rows), *self.row_shape), self.dtype)
        file_of_row = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(file_of_row):
            shard, chosen = self.shards[number], file_of_row == number
            taken[chosen] = shard[rows[chosen] - (self._ends[number] - len(shard))]
        return taken


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
        if start.getvalue().startswith(b"PK\x03\x04"):
            reason = "that of an .npz archive of several arrays"
        raise ValueError(f"{name}: must be an array in .npy format, got an unreadable header: {reason}") from error


def _check_alike(path: Path, shard: np.ndarray, first_path: Path, first: np.ndarray) -> None:
    if shard.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"{path}: must have rows of shape {first.shape[1:]} as {first_path} has, got {shard.shape[1:]}"
        )
    if shard.dtype != first.dtype:
        raise ValueError(f"{path}: must be {first.dtype} as {first_path} is, got {shard.dtype}")


def _read_labels(paths: list[Path], x: _Files, labels: Count | None) -> tuple[Int[np.ndarray, " rows"], int]:
    """All labels, read into memory, and how many different labels there are."""
    if len(paths) != len(x.paths):
        raise ValueError(f"label must be {len(x.paths)} files, one for each of x, got {len(paths)}")
    parts = [map_npy(path) for path in paths]
    for path, part, x_path, rows in zip(paths, parts, x.paths, x.rows_per_file, strict=True):
        if part.shape != (rows,):
            raise ValueError(f"{path}: must have shape ({rows},) for the rows of {x_path}, got {part.shape}")
    number = max(count_labels(str(path), part, len(part), labels) for path, part in zip(paths, parts, strict=True))
    return np.concatenate([part.astype(np.int32) for part in parts]), number


def _map_conditions(several: Any, x: _Files) -> PyTree[_Files]:
    """The arrays of a condition. `several` holds one PyTree of paths for each file of `x`."""
    if not isinstance(several, list | tuple) or len(several) != len(x.paths):
        found = len(several) if isinstance(several, list | tuple) else type(several).__name__
        raise ValueError(f"condition must be {len(x.paths)} PyTrees of paths, one for each file of x, got {found}")
    _check_paths(several)
    condition = jax.tree.map(lambda *paths: _Files([Path(path) for path in paths]), *several)
    for files in jax.tree.leaves(condition):
        numbers = zip(files.paths, x.paths, files.rows_per_file, x.rows_per_file, strict=True)
        for path, x_path, rows, wanted in numbers:
            if rows != wanted:
                raise ValueError(f"{path}: must have {wanted} rows as {x_path} has, got {rows}")
    return condition


def _check_paths(several: list[PyTree[Any]] | tuple[PyTree[Any], ...]) -> None:
    """Refuses PyTrees of different structures, without leaves, or with others than paths."""
    first = jax.tree.structure(several[0])
    if first.num_leaves == 0:
        raise ValueError(f"condition must hold at least one path or be None, got {several[0]!r}")
    for tree in several:
        if (found := jax.tree.structure(tree)) != first:
            raise ValueError(f"condition must have the same structure for all files of x, {first}, got {found}")
        for name, path in by_name("condition", tree).items():
            if not isinstance(path, str | os.PathLike):
                raise ValueError(f"{name} must be a path, got {type(path).__name__}")
