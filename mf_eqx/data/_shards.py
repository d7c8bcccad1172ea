"""A data set in one form, whatever it came from: .npy files of a fixed number of rows, and a manifest.

    folder/manifest.json      rows, shape, dtype, labels; name, length and SHA-256 of each file; its own digest
    folder/x_00000.npy ...    data
    folder/label_00000.npy    their labels, if there are any
    folder/crc_00000.npy      a CRC-32 for each row: `zlib.crc32(bytes of the row as in the file, label, or 0 if none)`

A folder is whole or not there: it is written beside its place, flushed to disk, and renamed at the end.

Disks, memory and copies change bytes in silence, and training takes whatever it gets. So no row leaves a `ShardSource`
before its CRC-32 is compared: a change of up to 32 bits in succession is always noticed, any other but for one in 2^32.
"""

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from jaxtyping import Int, Shaped, UInt32

from .._files import sha256_of_file
from .._validate import as_count, Count
from ._file import PathLike
from ._manifest import as_text, File, MANIFEST, Manifest, name_of_file, read_manifest, VERSION
from ._npy import map_npy, NpySource, NUMBERS
from ._source import AbstractSource, check_source, check_taken, Rows

_PIECE = 1 << 24
_MOST_SHARDS = 50_000
"""What a manifest may name: it is read as JSON of at most a million values."""
"""Bytes that are read or written at once, roughly."""
_ABANDONED = 3600
"""Seconds without a write after which nobody works on a folder any more."""


# Writing


def write_shards(
    source: AbstractSource,
    folder: PathLike,
    *,
    rows_per_shard: Count = 4096,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write all rows of `source` into a new folder, for `ShardSource`.

    Every value is checked on the way, and each row gets a checksum. A conversion that fails or is killed leaves no
    folder of this name; killed, it leaves a hidden one beside it, `.<name>.<random>.partial`, that may be deleted; the
    next conversion to the same place does so if it is older than an hour.

    **Arguments:**

    - `source`: any source of uint8 or of float16, float32 or float64, the dtypes that can be trained on and that .npy
      files keep. float64 stays float64 in the files; training without `jax_enable_x64` takes them as float32.
    - `folder`: where to write; it must not be there, or be empty.
    - `rows_per_shard`: rows of every file but the last. A `ShardSource` keeps one file open for each.
    - `progress`: called with the number of rows written so far.

    **Raises:** `ValueError` if `rows_per_shard` is no integer >= 1 or gives more than 50,000 shards, `folder` is not
    empty, `source` has no rows or another dtype, or gives rows of another shape or dtype than it says, values that are
    not finite (float64 ones, if `jax_enable_x64` is off, as float32), or labels out of range, with the row's number.
    `OSError` if it cannot be written.
    """
    rows_per_shard = as_count("rows_per_shard", rows_per_shard)
    check_source(source)
    if source.dtype.kind not in NUMBERS:
        raise ValueError(f"{source.name}: dtype must be one that .npy files keep, got {source.dtype}")
    if (number := -(-len(source) // rows_per_shard)) > _MOST_SHARDS:
        raise ValueError(
            f"rows_per_shard must give at most {_MOST_SHARDS:,} shards, got {rows_per_shard} for {number:,}"
        )
    target = Path(folder)
    _check_free(target)
    with _placed(target) as partial:
        starts = range(0, len(source), rows_per_shard)
        written = [
            _write_shard(source, partial, number, start, min(start + rows_per_shard, len(source)), progress)
            for number, start in enumerate(starts)
        ]
        _write_manifest(source, partial, written)


def _check_free(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: must be a new or empty folder, got a file")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: must be a new or empty folder, got one with files")


@contextlib.contextmanager
def _placed(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that gets its name at the end, and is deleted after an error."""
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
    """Deletes what killed conversions to `target` left, unless a file in it changed within the hour."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        with contextlib.suppress(OSError):  # of another's folder, or one that is just deleted
            if time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir())) > _ABANDONED:
                shutil.rmtree(left)


def _flush_folder(folder: Path) -> None:
    """To disk with the names in it, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Shard(NamedTuple):
    """What the manifest says of the files of some rows."""

    x: File
    label: File | None
    crc: File


def _write_shard(
    source: AbstractSource, folder: Path, number: int, start: int, stop: int, progress: Callable[[int], None] | None
) -> _Shard:
    """Rows from `start` to `stop` in a file of data, one of checksums and, with labels, one of labels."""
    label, crc = np.empty(stop - start, np.int32), np.empty(stop - start, np.uint32)
    with _NpyFile(folder / name_of_file("x", number), source.dtype, (stop - start, *source.row_shape)) as file:
        for first in range(start, stop, step := _rows_at_once(source)):
            rows = np.arange(first, min(first + step, stop))
            got = source.take(rows)
            check_taken(source, rows, got)
            file.write(got.x)
            label[rows - start] = 0 if got.label is None else got.label
            crc[rows - start] = _checksums(got.x, label[rows - start])
            if progress is not None:
                progress(int(rows[-1]) + 1)
    label_file = None if source.labels is None else _write_whole(folder / name_of_file("label", number), label)
    return _Shard(file.entry, label_file, _write_whole(folder / name_of_file("crc", number), crc))


def _write_whole(path: Path, array: Shaped[np.ndarray, " rows"]) -> File:
    with _NpyFile(path, array.dtype, array.shape) as file:
        file.write(array)
    return file.entry


def _checksums(x: Shaped[np.ndarray, "rows *data"], label: Int[np.ndarray, " rows"]) -> UInt32[np.ndarray, " rows"]:
    """The CRC-32 of each row as it is in a file, least significant byte first, that starts from the row's label."""
    held = np.ascontiguousarray(x, x.dtype.newbyteorder("<"))
    content, size = held.reshape(-1).view(np.uint8).data, held.nbytes // max(1, len(held))
    found = [zlib.crc32(content[i * size : (i + 1) * size], start) for i, start in enumerate(label.tolist())]
    return np.array(found, np.uint32)


def _rows_at_once(source: AbstractSource) -> int:
    return max(1, _PIECE // max(1, source.dtype.itemsize * int(np.prod(source.row_shape, dtype=np.int64))))


class _NpyFile:
    """A .npy file that is written piece by piece, with its length and digest taken on the way."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]):
        self._path, self._dtype, self._shape = path, dtype.newbyteorder("<"), shape
        self._hash, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> "_NpyFile":
        self._file = open(self._path, "xb")
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self, header)  # pyright: ignore[reportArgumentType]
        return self

    def write(self, content: bytes | Shaped[np.ndarray, "rows ..."]) -> None:
        held = content if isinstance(content, bytes) else np.ascontiguousarray(content, self._dtype).tobytes()
        self._hash.update(held)
        self._bytes += self._file.write(held)

    def __exit__(self, *error: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def entry(self) -> File:
        return File(self._path.name, self._shape[0], self._bytes, self._hash.hexdigest())


def _write_manifest(source: AbstractSource, folder: Path, written: list[_Shard]) -> None:
    x, crc = [shard.x for shard in written], [shard.crc for shard in written]
    label = [shard.label for shard in written if shard.label is not None] or None
    shape, dtype = list(source.row_shape), source.dtype.newbyteorder("=").name
    manifest = Manifest(VERSION, len(source), shape, dtype, source.labels, x, label, crc, "")
    with open(folder / MANIFEST, "x", encoding="ascii") as file:
        file.write(as_text(manifest))
        file.flush()
        os.fsync(file.fileno())


# Reading


class ShardSource(AbstractSource):
    """Rows in a folder that `write_shards` made. One file stays open for each shard.

    Opening compares the manifest with the length and header of each file of data, and with every byte of labels and
    checksums; `take` compares each row with its checksum; `verify` reads and compares all data. Files that the manifest
    does not name are not looked at.

    **Attributes:** `digest` tells the data: SHA-256 of a manifest that holds those of all files.

    **Arguments:** `folder`; `verify` whether to compare all data at once.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names the file, what was expected and what was
    found, also for a folder of an earlier version; from `take`, `ValueError` that names file and row if a row is not
    what was written.
    """

    def __init__(self, folder: PathLike, *, verify: bool = False):
        self._folder = Path(folder)
        self._manifest = read_manifest(self._folder / MANIFEST)
        held = self._manifest
        for file in [*held.x, *_small(held)]:
            _check_length(self._folder / file.name, file)
        for file in _small(held):
            _check_digest(self._folder / file.name, file)
        x, label, crc = ([self._folder / file.name for file in files] for files in (held.x, held.label or [], held.crc))
        self._source = NpySource(x, label or None, labels=held.labels)
        self.name, self.digest = str(self._folder), held.digest
        self.row_shape, self.dtype, self.labels = self._source.row_shape, self._source.dtype, self._source.labels
        self._check_counts()
        self._crc = np.concatenate([_read_checksums(path, file.rows) for path, file in zip(crc, held.x, strict=True)])
        if verify:
            self.verify()

    def __len__(self) -> int:
        return len(self._source)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        got = self._source.take(rows)
        found = _checksums(got.x, np.zeros(len(rows), np.int32) if got.label is None else got.label)
        if (wrong := found != self._crc[rows]).any():
            self._refuse(int(rows[np.argmax(wrong)]), int(found[np.argmax(wrong)]))
        return got

    def _refuse(self, row: int, found: int) -> NoReturn:
        """Says which row in which file is not what was written."""
        ends = np.cumsum(self._source.rows_per_file)
        number = int(np.searchsorted(ends, row, side="right"))
        path, first = self._folder / self._manifest.x[number].name, int(ends[number]) - self._manifest.x[number].rows
        rule = f"row {row} (row {row - first} in this file) must have CRC-32 {self._crc[row]:08x} as it was written"
        raise ValueError(f"{path}: {rule}, got {found:08x}")

    def verify(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Compare all data with the manifest.

        **Arguments:** `progress` is called with the number of rows compared so far, after each file of data.

        **Raises:** `ValueError` that names the first file whose bytes are not those that were written.
        """
        for file in _small(self._manifest):
            _check_digest(self._folder / file.name, file)
        done = 0
        for file in self._manifest.x:
            _check_digest(self._folder / file.name, file)
            done += file.rows
            if progress is not None:
                progress(done)

    def _check_counts(self) -> None:
        """Refuses a manifest that tells otherwise than the headers of its files."""
        path, held = self._folder / MANIFEST, self._manifest
        for name, told, found in (
            ("rows", held.rows, len(self)),
            ("row_shape", held.row_shape, list(self.row_shape)),
            ("dtype", held.dtype, self.dtype.name),
            ("x", [file.rows for file in held.x], self._source.rows_per_file),
        ):
            if told != found:
                raise ValueError(f"{path}: {name} must be {found} as in its files, got {told}"[:500])


def _small(manifest: Manifest) -> list[File]:
    """Files of labels and of checksums: some bytes for each row, read whole."""
    return [*(manifest.label or []), *manifest.crc]


def _read_checksums(path: Path, rows: int) -> UInt32[np.ndarray, " rows"]:
    crc = map_npy(path)
    if crc.shape != (rows,) or crc.dtype != np.dtype("<u4"):
        raise ValueError(f"{path}: must be uint32 of shape ({rows},), got {crc.dtype} of shape {crc.shape}")
    return np.array(crc, np.uint32)


def _check_length(path: Path, file: File) -> None:
    if (found := path.stat().st_size) != file.bytes:
        raise ValueError(f"{path}: must hold {file.bytes:,} bytes as {MANIFEST} tells, got {found:,}")


def _check_digest(path: Path, file: File) -> None:
    if (found := sha256_of_file(path)) != file.sha256:
        raise ValueError(f"{path}: must have SHA-256 {file.sha256[:16]}... as {MANIFEST} tells, got {found[:16]}...")
