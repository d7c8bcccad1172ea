"""Shards as a source of rows; `_shard_writer.py` has their format.

Opening a folder reads few bytes for each row: the manifest, the headers, the labels and the checksums. The data are
compared with their checksums row by row when they are returned, or all at once by `verify`.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jaxtyping import Int, UInt32

from .._files import sha256_of_file
from . import _structure
from ._file import PathLike, printable
from ._manifest import File, MANIFEST, Manifest, read_manifest
from ._npy import map_npy, NpySource
from ._row_checksums import row_checksums
from ._source import AbstractSource, Rows


class ShardSource(AbstractSource):
    """Rows in a folder that `write_shards` made. One file stays open for each shard.

    Opening compares the manifest with the length and header of each file of data and conditions, and with every byte of
    labels and checksums; `take` compares each row with its checksum; `verify` reads and compares all data. Files that
    the manifest does not name are ignored.

    **Attributes:** `digest` identifies the data: SHA-256 of the manifest, which contains the SHA-256 of all files.

    **Arguments:** `folder`; `verify` True to compare all data when the source is made.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names the file, what was expected and what was
    found, also for a folder of another version; from `take`, `ValueError` that names file and row if a row differs
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
        found = row_checksums(label, got.x, *jax.tree.leaves(got.condition))
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
