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

Disks, memory and copying can change bytes without an error, and training would use the changed values. So a
`ShardSource` compares the CRC-32 of every row that it returns: a change within 32 successive bits is always detected,
any other change with probability 1 - 2^-32.
"""

import contextlib
import glob
import hashlib
import itertools
import math
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jaxtyping import Int, Shaped, UInt32

from .._files import named_in_errors, sha256_of_file
from .._leaves import by_name
from .._validate import as_count, Count
from . import _structure
from ._file import PathLike, printable
from ._manifest import (
    as_text,
    File,
    MANIFEST,
    Manifest,
    name_of_file,
    read_manifest,
    VERSION,
    VERSION_WITH_CONDITION,
)
from ._npy import map_npy, NpySource, NUMBERS
from ._source import AbstractSource, check_source, check_taken, name_in_errors, Rows

_PIECE = 1 << 24
"""The approximate number of bytes that are read or written at once."""
_MOST_SHARDS = 50_000
_MOST_FILES = 3 * _MOST_SHARDS
"""The largest number of files in a manifest, which is read as JSON of at most a million values. A shard has up to three
files, or two and one for each array of a condition."""
_ABANDONED = 3600
"""Seconds since the last write after which an unfinished folder is taken to be abandoned."""


# Writing


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
    - `folder`: where to write; it must not exist or must be empty.
    - `rows_per_shard`: the number of rows in every shard but the last. A `ShardSource` keeps one file open per shard.
    - `progress`: called with the number of rows written so far.

    **Raises:** `ValueError` if `rows_per_shard` is not an integer >= 1 or gives more than 50,000 shards (fewer if a
    condition has several arrays), if `folder` is not empty, if `source` has no rows or another dtype, or if `source`
    returns rows of another shape or dtype than it declares, values that are not finite (float64 values are checked as
    float32 if `jax_enable_x64` is off), or labels out of range; errors about values name the row. `OSError` if the
    folder cannot be written.
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
    target = Path(folder)
    _check_free(target)
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
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: must be a new or empty folder, got one with files")


@contextlib.contextmanager
def _renamed_at_the_end(target: Path) -> Iterator[Path]:
    """A context with a new folder beside `target`: it is renamed to `target` at the end, or deleted after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(target.absolute())
    partial = target.absolute().with_name(f".{target.absolute().name}.{secrets.token_hex(4)}.partial")
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
            crc[rows - start] = _checksums(label[rows - start], *arrays)
            if progress is not None:
                progress(int(rows[-1]) + 1)
    label_file = None if source.labels is None else _write_array(folder / name_of_file("label", number), label)
    crc_file = _write_array(folder / name_of_file("crc", number), crc)
    return _Shard(x.entry, label_file, crc_file, [file.entry for file in condition])


def _write_array(path: Path, array: Shaped[np.ndarray, " rows"]) -> File:
    with _NpyFile(path, array.dtype, array.shape) as file:
        file.write(array)
    return file.entry


def _checksums(label: Int[np.ndarray, " rows"], *arrays: Shaped[np.ndarray, "rows ..."]) -> UInt32[np.ndarray, " rows"]:
    """The CRC-32 of the little-endian bytes of each row, as in the files, one array after the other, with the row's
    label as the starting value."""
    checksums = label.tolist()
    for array in arrays:
        rows = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        content, size = rows.reshape(-1).view(np.uint8).data, rows.nbytes // max(1, len(rows))
        checksums = [zlib.crc32(content[i * size : (i + 1) * size], start) for i, start in enumerate(checksums)]
    return np.array(checksums, np.uint32)


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
    manifest = Manifest(VERSION, len(source), shape, dtype, source.labels, x, label, crc, "", class_names=names)
    if structure is not None:
        condition = [list(files) for files in zip(*(shard.condition for shard in written), strict=True)]
        manifest = manifest._replace(version=VERSION_WITH_CONDITION, row_condition=structure, condition=condition)
    with named_in_errors(folder / MANIFEST), open(folder / MANIFEST, "x", encoding="ascii") as file:
        file.write(as_text(manifest))
        file.flush()
        os.fsync(file.fileno())


# Reading


class ShardSource(AbstractSource):
    """Rows in a folder that `write_shards` made. One file stays open for each shard.

    Opening compares the manifest with the length and header of each file of data and conditions, and with every byte of
    labels and checksums; `take` compares each row with its checksum; `verify` reads and compares all data. Files that
    the manifest does not name are ignored.

    **Attributes:** `digest` identifies the data: SHA-256 of the manifest, which contains the SHA-256 of all files.

    **Arguments:** `folder`; `verify` True to compare all data when the source is made.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names the file, what was expected and what was
    found, also for a folder of an earlier version; from `take`, `ValueError` that names file and row if a row differs
    from what was written.
    """

    def __init__(self, folder: PathLike, *, verify: bool = False):
        self._folder = Path(folder)
        self._manifest = manifest = read_manifest(self._folder / MANIFEST)
        for file in [*_large_files(manifest), *_small_files(manifest)]:
            _check_length(self._folder / file.name, file)
        for file in _small_files(manifest):
            _check_digest(self._folder / file.name, file)
        kinds = (manifest.x, manifest.label or [], manifest.crc)
        x, label, crc = ([self._folder / file.name for file in files] for files in kinds)
        self._source = NpySource(x, label or None, condition=self._condition_paths(), labels=manifest.labels)
        self.name, self.digest = str(self._folder), manifest.digest
        self.row_shape, self.dtype, self.labels = self._source.row_shape, self._source.dtype, self._source.labels
        self.row_condition = self._source.row_condition
        self.class_names = None if manifest.class_names is None else tuple(map(printable, manifest.class_names))
        self._check_counts()
        checksums = [_read_checksums(path, file.rows) for path, file in zip(crc, manifest.x, strict=True)]
        self._crc = np.concatenate(checksums)
        if verify:
            self.verify()

    def __len__(self) -> int:
        return len(self._source)

    def _condition_paths(self) -> list[Any] | None:
        """For each shard, the paths of the arrays of its condition in their structure."""
        manifest = self._manifest
        if manifest.condition is None:
            return None
        structure = jax.tree.structure(_structure.from_json(manifest.row_condition))
        shards = zip(*manifest.condition, strict=True)
        return [jax.tree.unflatten(structure, [self._folder / file.name for file in files]) for files in shards]

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        got = self._source.take(rows)
        label = np.zeros(len(rows), np.int32) if got.label is None else got.label
        found = _checksums(label, got.x, *jax.tree.leaves(got.condition))
        if (wrong := found != self._crc[rows]).any():
            self._refuse(int(rows[np.argmax(wrong)]), int(found[np.argmax(wrong)]))
        return got

    def _refuse(self, row: int, found: int) -> NoReturn:
        """Raises the error that names the row, and its file, that differs from what was written."""
        ends = np.cumsum(self._source.rows_per_file)
        number = int(np.searchsorted(ends, row, side="right"))
        path, first = self._folder / self._manifest.x[number].name, int(ends[number]) - self._manifest.x[number].rows
        also = "" if self.row_condition is None else ", with its condition,"
        rule = (
            f"row {row} (row {row - first} in this file){also} must have CRC-32 {self._crc[row]:08x} as it was written"
        )
        raise ValueError(f"{path}: {rule}, got {found:08x}")

    def verify(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Compare all data with the manifest.

        **Arguments:** `progress` is called with the number of rows compared so far, after each file of data.

        **Raises:** `ValueError` that names the first file whose bytes differ from those that were written.
        """
        for file in _small_files(self._manifest):
            _check_digest(self._folder / file.name, file)
        done = 0
        for number, x in enumerate(self._manifest.x):
            for file in [x, *(files[number] for files in self._manifest.condition or [])]:
                _check_digest(self._folder / file.name, file)
            done += x.rows
            if progress is not None:
                progress(done)

    def _check_counts(self) -> None:
        """Refuses a manifest that differs from the headers of its files."""
        path, manifest = self._folder / MANIFEST, self._manifest
        for name, declared, actual in (
            ("rows", manifest.rows, len(self)),
            ("row_shape", manifest.row_shape, list(self.row_shape)),
            ("dtype", manifest.dtype, self.dtype.name),
            ("x", [file.rows for file in manifest.x], self._source.rows_per_file),
            ("row_condition", manifest.row_condition, self.row_condition and _structure.as_json(self.row_condition)),
        ):
            if declared != actual:
                raise ValueError(f"{path}: {name} must be {actual} as in its files, got {declared}"[:500])


def _large_files(manifest: Manifest) -> list[File]:
    """The files of data and of conditions, of which only the length and the header are read when a folder is opened."""
    return [*manifest.x, *itertools.chain.from_iterable(manifest.condition or [])]


def _small_files(manifest: Manifest) -> list[File]:
    """The files of labels and of checksums: with a few bytes for each row, they are read as a whole."""
    return [*(manifest.label or []), *manifest.crc]


def _read_checksums(path: Path, rows: int) -> UInt32[np.ndarray, " rows"]:
    crc = map_npy(path)
    if crc.shape != (rows,) or crc.dtype != np.dtype("<u4"):
        raise ValueError(f"{path}: must be uint32 of shape ({rows},), got {crc.dtype} of shape {crc.shape}")
    return np.array(crc, np.uint32)


def _check_length(path: Path, file: File) -> None:
    if (found := path.stat().st_size) != file.bytes:
        raise ValueError(f"{path}: must hold {file.bytes:,} bytes as {MANIFEST} says, got {found:,}")


def _check_digest(path: Path, file: File) -> None:
    if (found := sha256_of_file(path)) != file.sha256:
        raise ValueError(f"{path}: must have SHA-256 {file.sha256[:16]}... as {MANIFEST} says, got {found[:16]}...")
