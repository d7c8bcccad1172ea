"""Arrays in ArrayRecord files, Grain's format for random access.

A record here is what `np.save` or `np.savez` writes, so that it contains its own shape and dtype.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, Shaped

from .._files import open_regular
from .._optional import optional
from .._validate import Count
from ._check import as_label_count
from ._file import as_paths, name_of, PathLike
from ._npy import LONGEST_HEADER, parse_header
from ._source import AbstractSource, Rows

Record: TypeAlias = tuple[Shaped[np.ndarray, "..."], int | None]
"""The data of one row, and its label or None."""

_LARGEST_RECORD = 1 << 30
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


def decode_npy(record: bytes) -> Record:
    """The row in a record: either one array in the format .npy, or the arrays `x` and `label` (a single integer) in the
    format .npz.

    **Raises:** `ValueError` if the record has neither format or is damaged, or if it holds other arrays, objects, or
    more than 1 GiB.
    """
    if record[:2] != b"PK":
        return _load("x", record), None
    contents = _unpack(record)
    x, label = (_load(name, contents[f"{name}.npy"]) for name in ("x", "label"))
    if label.shape != () or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"label must be a single integer, got {label.dtype} of shape {label.shape}")
    return x, int(label)


def _unpack(record: bytes) -> dict[str, bytes]:
    """The members `x.npy` and `label.npy` of an archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            _check_members(archive.infolist())
            return {info.filename: _read_member(archive, info) for info in archive.infolist()}
    except ValueError:
        raise
    except Exception as error:  # damaged archives fail in many ways
        raise ValueError(f"must be a whole .npz archive, got: {_first_line(error)}") from error


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    names = sorted(info.filename for info in members)
    if names != ["label.npy", "x.npy"]:
        raise ValueError(f"must hold x and label, got {', '.join(names) or 'nothing'}"[:200])
    if (size := sum(info.file_size for info in members)) > _LARGEST_RECORD:
        raise ValueError(f"must unpack to at most {_LARGEST_RECORD:,} bytes, got {size:,}")
    for info in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a bound
            raise ValueError(f"must be stored or deflated, got {info.filename} packed by method {info.compress_type}")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as member:
        # Without a size, `read` may unpack 2 GiB at once, whatever length the archive declares.
        return member.read(info.file_size + 1)


def _load(name: str, content: bytes) -> Shaped[np.ndarray, "..."]:
    header = parse_header(name, content[:LONGEST_HEADER], len(content))
    values = np.frombuffer(content, header.dtype, offset=header.offset)
    value = values.reshape(header.shape, order="F" if header.columns_first else "C")
    return value.astype(value.dtype.newbyteorder("="), order="C", copy=False)


class ArrayRecordSource(AbstractSource):
    """Rows in ArrayRecord files, one record for each row, one file after the other. All files stay open, and every
    record is checked when it is read.

    **Arguments:**

    - `paths`: one path or several, in the order of their rows.
    - `decode`: a function from a record's bytes to the row's data and its label, which is an integer or None. If it
      raises, the error is raised again as a `ValueError` that names the file and the record. The first record defines
      shape, dtype and whether there are labels; every other record is compared with it when it is read.
    - `labels`: how many different labels there are; required if there are any, since they could only be counted by
      reading all records.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names file, record, what was expected and what
    was found: not an ordinary file, not an ArrayRecord file, a truncated or damaged one (it has checksums), no records,
    records that differ from the first, labels that are missing, unexpected or out of range. `MissingDependency` if
    `array_record` is missing; Grain installs it on platforms where it can be built.
    """

    def __init__(
        self,
        paths: PathLike | Sequence[PathLike],
        *,
        decode: Callable[[bytes], Record] = decode_npy,
        labels: Count | None = None,
    ):
        self._paths, self._decode = as_paths("paths", paths), decode
        self.name, self.labels = name_of(self._paths), None if labels is None else as_label_count(labels)
        self._readers = [_open(path) for path in self._paths]
        self._ends = np.cumsum([reader.num_records() for reader in self._readers])
        x, label = self._read_and_decode(0, 0)
        self.row_shape, self.dtype = x.shape, x.dtype
        if (label is None) != (labels is None):
            found = "a label" if labels is None else "no label"
            raise ValueError(
                f"{self._paths[0]}: labels must be given if and only if records have labels, got {labels} and {found}"
            )
        self._check(x, label, 0, 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x, label = np.empty((len(rows), *self.row_shape), self.dtype), np.empty(len(rows), np.int32)
        starts = np.concatenate([[0], self._ends])
        for position, row in enumerate(rows.tolist()):
            file = int(np.searchsorted(self._ends, row, side="right"))
            x[position], row_label = self._read_row(file, row - int(starts[file]))
            label[position] = 0 if row_label is None else row_label
        return Rows(x, None if self.labels is None else label)

    def _read_row(self, file: int, number: int) -> Record:
        x, label = self._read_and_decode(file, number)
        self._check(x, label, file, number)
        return x, label

    def _read_and_decode(self, file: int, number: int) -> Record:
        try:
            (record,) = self._readers[file].read([number])
        except RuntimeError as error:
            raise ValueError(
                f"{self._paths[file]}: record {number} must be whole, got: {_first_line(error)}"
            ) from error
        try:
            return self._decode(record)
        except Exception as error:  # damaged archives and headers fail in many ways
            raise ValueError(f"{self._paths[file]}: record {number}: {_first_line(error)}") from error

    def _check(self, x: Shaped[np.ndarray, "..."], label: int | None, file: int, number: int) -> None:
        where = f"{self._paths[file]}: record {number}"
        if x.shape != self.row_shape or x.dtype != self.dtype:
            expected = f"{self.dtype} of shape {self.row_shape} as the first record does"
            raise ValueError(f"{where} must hold {expected}, got {x.dtype} of shape {x.shape}")
        if (label is None) != (self.labels is None):
            wanted = "no label" if self.labels is None else "a label"
            raise ValueError(f"{where} must have {wanted} as the first record has, got {label}")
        if label is None or self.labels is None:
            return
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise ValueError(f"{where}: label must be an integer, got {label!r}")
        if not 0 <= label < self.labels:
            raise ValueError(f"{where}: label must lie in [0, {self.labels - 1}], got {label}")


def _open(path: Path) -> Any:
    """A reader of a file, which must have at least one record. The library raises no error when it cannot open a file;
    so this function does."""
    reader_class = _reader_class()
    with open_regular(path):  # if the path were a pipe, the library would wait for it for ever
        pass
    reader = reader_class(str(path), options=_RANDOM_ACCESS, file_reader_buffer_size=1 << 15)
    if not reader.ok():
        raise ValueError(f"{path}: must be a whole ArrayRecord file, got: {_reason(reader)}")
    if reader.num_records() == 0:
        raise ValueError(f"{path}: must have at least one record, got none")
    return reader


def _reader_class() -> Any:
    with optional("array_record"):
        from array_record.python.array_record_module import ArrayRecordReader
    return ArrayRecordReader


def _reason(reader: Any) -> str:
    """Why a reader could not open its file: the library reports it only when a record is read."""
    try:
        reader.read([0])
    except RuntimeError as error:
        return _first_line(error)
    return "no reason was reported"


def _first_line(error: Exception) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__)[:300]
