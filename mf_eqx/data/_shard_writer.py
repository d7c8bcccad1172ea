"""Shards, one format for data sets of any origin: .npy files with a fixed number of rows each, and a manifest.

    folder/manifest.json      rows, shape, dtype, labels, names of classes, structure of other conditions with shapes
                              and dtypes; name, length and SHA-256 of each file; its own digest
    folder/x_00000.npy ...    the data
    folder/label_00000.npy    the labels of these data, if there are any
    folder/condition_0_00000.npy, condition_1_00000.npy, ...        the arrays of another condition, if there is one
    folder/crc_00000.npy      a CRC-32 for each row: `zlib.crc32(bytes of the row as in the file, label, or 0 if none)`,
                              continued over the bytes of the row's condition

A folder is complete or does not exist: it is written under another name beside it, flushed to disk, and renamed at the
end.
"""

import contextlib
import glob
import hashlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from .._files import named_in_errors, write_whole
from .._leaves import by_name
from .._validate import as_count, Count
from . import _structure
from ._file import PathLike
from ._manifest import as_text, File, MANIFEST, Manifest, name_of_file, VERSION
from ._npy import NUMBERS
from ._row_checksums import row_checksums
from ._source import AbstractSource, check_source, check_taken, name_in_errors

_PIECE = 1 << 24
"""The approximate number of bytes that are read or written at once."""
_MOST_SHARDS = 50_000
_MOST_FILES = 3 * _MOST_SHARDS
"""The largest number of files in a manifest, which is read as JSON of at most a million values. A shard has up to three
files, or two and one for each array of a condition."""
_ABANDONED = 3600
"""Seconds since the last write after which an unfinished folder is taken to be abandoned."""


def write_shards(
    source: AbstractSource,
    folder: PathLike,
    *,
    rows_per_shard: Count = 4096,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write all rows of `source` into a new folder, for `ShardSource`.

    Every value is checked before it is written, and each row gets a checksum. A conversion that fails or is killed does
    not leave a folder of this name. A killed one leaves a hidden folder beside it, `.<name>.<random>.partial`, which
    may be deleted; the next conversion to the same folder deletes it if it is older than an hour.

    **Arguments:**

    - `source`: any source of uint8, float16, float32 or float64, which are the dtypes that can be trained on and stored
      in .npy files. float64 stays float64 in the files; training without `jax_enable_x64` converts it to float32. A
      condition that is no label must be made of dictionaries with text as keys, tuples, lists and arrays.
    - `folder`: where to write; it must not exist or must be empty. Of a symbolic link, it is the folder to which the
      link points.
    - `rows_per_shard`: the number of rows in every shard but the last. A `ShardSource` keeps one file open per shard.
    - `progress`: called with the number of rows written so far.

    **Raises:** `ValueError` if `rows_per_shard` is not an integer >= 1 or gives more than 50,000 shards (fewer if a
    condition has several arrays), if `folder` is not empty or is the current directory, if `source` has no rows or
    another dtype, or if `source` returns rows of another shape or dtype than it declares, values that are not finite
    (float64 values are checked as float32 if `jax_enable_x64` is off), or labels out of range; errors about values name
    the row. `OSError` if the folder cannot be written, or is a mount point.
    """
    rows_per_shard = as_count("rows_per_shard", rows_per_shard)
    check_source(source)
    if source.dtype.kind not in NUMBERS:
        raise ValueError(f"{source.name}: dtype must be one that .npy files can store, got {source.dtype}")
    structure = _structure_of(source)
    most = _MOST_FILES // max(3, 2 + len(jax.tree.leaves(source.row_condition)))
    if (number := -(-len(source) // rows_per_shard)) > most:
        raise ValueError(
            f"rows_per_shard must give at most {most:,} shards, got {rows_per_shard} with {number:,} shards"
        )
    target = Path(os.path.realpath(folder))
    _check_free(target)
    _check_replaceable(target)
    with _renamed_at_the_end(target) as partial:
        starts = range(0, len(source), rows_per_shard)
        written = [
            _write_shard(source, partial, number, start, min(start + rows_per_shard, len(source)), progress)
            for number, start in enumerate(starts)
        ]
        _write_manifest(source, structure, partial, written)


def _structure_of(source: AbstractSource) -> dict[str, Any] | None:
    """The structure of the source's condition for the manifest, or None without one."""
    if source.row_condition is None:
        return None
    with name_in_errors(source.name):
        for name, leaf in by_name("condition", source.row_condition).items():
            if leaf.dtype.kind not in NUMBERS:
                raise ValueError(f"{name} must be of a dtype that .npy files can store, got {leaf.dtype}")
        return _structure.as_json(source.row_condition)


def _check_free(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: must be a new or empty folder, got a file")
    if target.is_symlink():
        raise ValueError(f"{target}: must be a new or empty folder, got a symbolic link to itself")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: must be a new or empty folder, got one with files")


def _check_replaceable(target: Path) -> None:
    """Refuses an empty folder that the rename at the end could not replace."""
    if not target.exists():
        return
    if target.samefile(os.curdir):
        raise ValueError(f"{target}: must be a folder that can be replaced, got the current directory")
    aside = _beside(target)
    try:
        os.rename(target, aside)
    except OSError as error:
        reason = f"{error.strerror}: must be a folder that can be replaced, no mount point"
        raise OSError(error.errno, reason, str(target)) from error
    os.rename(aside, target)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def _renamed_at_the_end(target: Path) -> Iterator[Path]:
    """A context with a new folder beside `target`: it is renamed to `target` at the end, or deleted after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(target)
    partial = _beside(target)
    partial.mkdir()
    try:
        yield partial
        _flush_folder(partial)
        _check_free(target)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_folder(target.parent)


def _delete_abandoned(target: Path) -> None:
    """Deletes the folders of killed conversions to `target`, unless a file in them has changed within the last hour."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        with contextlib.suppress(OSError):  # the folder may be another user's, or be deleted at the same time
            if time.time() - max(path.stat().st_mtime for path in (partial, *partial.iterdir())) > _ABANDONED:
                shutil.rmtree(partial)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, on systems that can do so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Shard(NamedTuple):
    """The entries of the manifest for the files of one shard."""

    x: File
    label: File | None
    crc: File
    condition: list[File]


def _write_shard(
    source: AbstractSource, folder: Path, number: int, start: int, stop: int, progress: Callable[[int], None] | None
) -> _Shard:
    """Write rows `start` to `stop` - 1: files of data, of the arrays of a condition, of labels and of checksums."""
    label, crc = np.empty(stop - start, np.int32), np.empty(stop - start, np.uint32)
    with contextlib.ExitStack() as files:

        def new(kind: str, dtype: np.dtype, row_shape: tuple[int, ...]) -> _NpyFile:
            path = folder / name_of_file(kind, number)
            return files.enter_context(_NpyFile(path, dtype, (stop - start, *row_shape)))

        likes = enumerate(jax.tree.leaves(source.row_condition))
        condition = [new(f"condition_{leaf}", like.dtype, like.shape) for leaf, like in likes]
        x = new("x", source.dtype, source.row_shape)
        for first in range(start, stop, step := _rows_at_once(source)):
            rows = np.arange(first, min(first + step, stop))
            got = source.take(rows)
            check_taken(source, rows, got)
            arrays = [got.x, *jax.tree.leaves(got.condition)]
            for file, array in zip([x, *condition], arrays, strict=True):
                file.write(array)
            label[rows - start] = 0 if got.label is None else got.label
            crc[rows - start] = row_checksums(label[rows - start], *arrays)
            if progress is not None:
                progress(int(rows[-1]) + 1)
    label_file = None if source.labels is None else _write_array(folder / name_of_file("label", number), label)
    crc_file = _write_array(folder / name_of_file("crc", number), crc)
    return _Shard(x.entry, label_file, crc_file, [file.entry for file in condition])


def _write_array(path: Path, array: Shaped[np.ndarray, " rows"]) -> File:
    with _NpyFile(path, array.dtype, array.shape) as file:
        file.write(array)
    return file.entry


def _rows_at_once(source: AbstractSource) -> int:
    row = [jax.ShapeDtypeStruct(source.row_shape, source.dtype), *jax.tree.leaves(source.row_condition)]
    return max(1, _PIECE // max(1, sum(part.dtype.itemsize * math.prod(part.shape) for part in row)))


class _NpyFile:
    """A .npy file that is written piece by piece, while its length and digest are computed."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]):
        self._path, self._dtype, self._shape = path, dtype.newbyteorder("<"), shape
        self._hash, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> "_NpyFile":
        self._file = open(self._path, "xb")
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self, header)  # pyright: ignore[reportArgumentType]
        return self

    def write(self, content: bytes | Shaped[np.ndarray, "rows ..."]) -> None:
        data = content if isinstance(content, bytes) else np.ascontiguousarray(content, self._dtype).tobytes()
        self._hash.update(data)
        with named_in_errors(self._path):
            self._bytes += self._file.write(data)

    def __exit__(self, *error: object) -> None:
        with named_in_errors(self._path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def entry(self) -> File:
        return File(self._path.name, self._shape[0], self._bytes, self._hash.hexdigest())


def _write_manifest(
    source: AbstractSource, structure: dict[str, Any] | None, folder: Path, written: list[_Shard]
) -> None:
    x, crc = [shard.x for shard in written], [shard.crc for shard in written]
    label = [shard.label for shard in written if shard.label is not None] or None
    shape, dtype = list(source.row_shape), source.dtype.newbyteorder("=").name
    names = None if source.class_names is None else list(source.class_names)
    arrays = [list(files) for files in zip(*(shard.condition for shard in written), strict=True)]
    condition = None if structure is None else arrays
    manifest = Manifest(
        VERSION, len(source), shape, dtype, source.labels, x, label, crc, structure, condition, names, digest=""
    )
    write_whole(folder / MANIFEST, as_text(manifest).encode("ascii"))
