"""CIFAR-10 as its authors distribute it: a folder or an archive, in the binary or in the Python version.

Nothing is extracted, and no pickled code is executed. https://www.cs.toronto.edu/~kriz/cifar.html

Reference: Alex Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from .._files import read_regular
from ._byte_arrays import read_plain_pickle
from ._file import open_unpacked, PathLike
from ._source import ArraySource, count_labels
from ._tar import TarReader

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LABELS = len(_CLASSES)
_PIXELS = 3 * 32 * 32
_LARGEST_FILE = 1 << 26
"""In bytes; the largest file of CIFAR-10 has 31,035,704."""
_LARGEST_ARCHIVE = 1 << 29
"""In bytes when unpacked; the archives of CIFAR-10 have 190 million."""
_MOST_MEMBERS = 1000


class _Part(NamedTuple):
    """The images of one file."""

    x: UInt8[np.ndarray, "rows 3 32 32"]
    label: UInt8[np.ndarray, " rows"]


def read_cifar10(path: PathLike, *, train: bool = True) -> ArraySource:
    """CIFAR-10, bytes of shape (3, 32, 32) in the order red, green, blue, with ten labels and their names.

    **Arguments:**

    - `path`: a folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin (the binary version), or with the
      same names without ".bin" (the Python version); or the archive of either, gzipped or not. If both versions are
      there, the binary one is read. Files and members of other names are ignored.
    - `train`: True for the training batches, False for the test batch.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names the file, what was expected and what was
    found: missing files, pipes and devices, a number of records that is not whole, a label outside [0, 9], pickled
    objects that are no part of CIFAR-10, archives that are damaged or unpack to too many bytes, members that are links
    or lie outside of the archive's folder.
    """
    root = Path(path)
    stems = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    binary = [f"{stem}.bin" for stem in stems]
    contents = _read_folder(root, [*binary, *stems]) if root.is_dir() else _read_archive(root, [*binary, *stems])
    is_binary = any(name in contents for name in binary)
    wanted, decode = (binary, _decode_binary) if is_binary else (stems, _decode_python)
    if not contents:
        raise ValueError(f"{root}: must hold {_span(binary)} or {_span(stems)} of CIFAR-10, got none of them")
    if missing := [name for name in wanted if name not in contents]:
        raise ValueError(f"{root}: must hold {_span(wanted)} of CIFAR-10, got no {', '.join(missing)}")
    parts = [decode(str(root / name), contents[name]) for name in wanted]
    x, label = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ArraySource(x, label, class_names=_CLASSES, name=str(root))


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _read_folder(root: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of the files in `names` that exist."""
    return {name: read_regular(root / name, _LARGEST_FILE) for name in names if (root / name).exists()}


class _LimitedFile(io.RawIOBase):
    """A file of which at most `_LARGEST_ARCHIVE` bytes can be read."""

    def __init__(self, file: io.BufferedIOBase, path: Path):
        self._file, self._path, self._remaining = file, path, _LARGEST_ARCHIVE

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._remaining -= len(content)
        if self._remaining < 0:
            raise ValueError(f"{self._path}: must unpack to at most {_LARGEST_ARCHIVE:,} bytes, got more")
        return content


def _read_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of the members in `names` that exist, read into memory in one pass."""
    contents = {}
    with open_unpacked(path, _LARGEST_ARCHIVE) as file:
        limited = _LimitedFile(file, path)
        archive = TarReader(limited, most_members=_MOST_MEMBERS, most_bytes=_LARGEST_ARCHIVE)
        try:
            for member in archive:
                if (name := PurePosixPath(member.name).name) in names:
                    _check_member(path, member, name, contents)
                    contents[name] = archive.read()
        except tarfile.TarError as error:
            raise ValueError(f"{path}: must be a tar archive of CIFAR-10, gzipped or not, got: {error}") from error
        while limited.read(1 << 20):  # to the end of the file, where gzip stores its checksum
            pass
    return contents


def _check_member(path: Path, member: tarfile.TarInfo, name: str, contents: dict[str, bytes]) -> None:
    """Refuses a member with the name of a batch if it is not an ordinary file, lies outside of the archive's folder, is
    the second of this name, or is too large."""
    if not member.isreg():
        raise ValueError(f"{path}: {name} must be an ordinary file, got a link, a device or the like")
    parts = PurePosixPath(member.name).parts
    if ".." in parts or member.name.startswith("/"):
        raise ValueError(f"{path}: {name} must lie inside of the archive, got {member.name!r}")
    if name in contents:
        raise ValueError(f"{path}: {name} must be there only once, got it again")
    if member.size > _LARGEST_FILE:
        raise ValueError(f"{path}: {name} must hold at most {_LARGEST_FILE:,} bytes, got {member.size:,}")


def _decode_binary(name: str, content: bytes) -> _Part:
    """Images from records of one byte for the label and then the pixels, one colour after the other."""
    size = 1 + _PIXELS
    if not content or len(content) % size:
        raise ValueError(f"{name}: must hold a whole number of records of {size:,} bytes, got {len(content):,} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    count_labels(name, records[:, 0], len(records), _LABELS)
    return _Part(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])


def _decode_python(name: str, content: bytes) -> _Part:
    """Images from a pickled dictionary with `data` of shape (rows, 3072) and a list `labels`."""
    values = read_plain_pickle(name, content, "CIFAR-10")
    x, label = values.get("data"), values.get("labels")
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != _PIXELS or not len(x):
        found = f"shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ValueError(f"{name}: data must be an array of shape (rows, {_PIXELS}), got {found}")
    if not isinstance(label, list) or len(label) != len(x):
        found = len(label) if isinstance(label, list) else type(label).__name__
        raise ValueError(f"{name}: labels must be a list of {len(x)} numbers, got {found}")
    for row, value in enumerate(label):
        if type(value) is not int or not 0 <= value < _LABELS:
            found = value if type(value) is int else type(value).__name__
            raise ValueError(f"{name}: label must be an integer in [0, {_LABELS - 1}], got {found} in row {row}")
    return _Part(x.reshape(-1, 3, 32, 32), np.array(label, np.uint8))
