"""IDX files, the format of MNIST and similar data sets.

A file holds the bytes 0, 0, a code for the dtype and the number n of axes, then n big-endian 32-bit sizes, then all
values in row-major order.

Reference: Yann LeCun, Corinna Cortes and Christopher Burges, "The MNIST database of handwritten digits", 1998.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from .._files import read_up_to
from .._validate import as_count, Count
from ._file import most_unpacked, open_unpacked, PathLike
from ._source import ArraySource, count_labels

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_AXES = 8


def read_idx(
    images: PathLike,
    label: PathLike | None = None,
    *,
    labels: Count | None = None,
    class_names: Sequence[str] | None = None,
    most_bytes: Count = 1 << 33,
) -> ArraySource:
    """The rows of IDX files, gzipped or not, read into memory.

    **Arguments:**

    - `images`: path of the images, (rows, height, width), which become (rows, 1, height, width); other shapes with a
      leading row axis are not changed. Neither are the values: bytes from 0 to 255 for MNIST. (Among the dtypes of the
      format, uint8 and floating point can be trained on.)
    - `label`: path of a file with an integer for each row, or None.
    - `labels`: how many different labels there are, by default as many as `class_names`, or the largest one plus 1.
    - `class_names`: what the labels mean, which the files do not say, or None.
    - `most_bytes`: the largest number of bytes that the values of a file may have when unpacked, 8 GiB by default.

    **Raises:** `OSError` if a file cannot be opened; `ValueError` that names the file, what was expected and what was
    found: not an ordinary file, another format, fewer or more bytes than its header declares, more than `most_bytes`,
    no rows, labels that do not fit.
    """
    most_bytes = as_count("most_bytes", most_bytes)
    x = _read(Path(images), most_bytes)
    if x.ndim < 2:
        raise ValueError(f"{images}: must have a row axis and others, got shape {x.shape}")
    x = x[:, None] if x.ndim == 3 else x
    if label is None:
        return ArraySource(x, labels=labels, class_names=class_names, name=str(images))
    values = _read(Path(label), most_bytes)
    labels = len(class_names) if class_names is not None and labels is None else labels
    labels = count_labels(str(label), values, len(x), labels)
    return ArraySource(x, values, labels=labels, class_names=class_names, name=str(images))


def _read(path: Path, most_bytes: int) -> Shaped[np.ndarray, "rows ..."]:
    with open_unpacked(path) as file:
        start = read_up_to(file, 4)
        if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _DTYPES or not 1 <= start[3] <= _MOST_AXES:
            raise ValueError(
                f"{path}: must start with 0, 0, a dtype and a number of axes as IDX does, got {bytes(start)!r}"
            )
        dtype, axes = np.dtype(_DTYPES[start[2]]), start[3]
        sizes = read_up_to(file, 4 * axes)
        if len(sizes) < 4 * axes:
            raise ValueError(f"{path}: must hold {4 + 4 * axes} bytes of header, got {4 + len(sizes)}")
        shape = tuple(np.frombuffer(sizes, ">u4").tolist())
        if min(shape) == 0:
            raise ValueError(f"{path}: must have at least one row and no empty axis, got shape {shape}")
        length = math.prod(shape) * dtype.itemsize
        _check_bound(path, length, most_bytes, f"for shape {shape} of {dtype}")
        values = read_up_to(file, length + 1)
    if len(values) != length:
        found = f"{len(values):,}" if len(values) < length else "more"
        raise ValueError(f"{path}: must hold {length:,} bytes for shape {shape} of {dtype}, got {found}")
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _check_bound(path: Path, length: int, most_bytes: int, reason: str) -> None:
    """Refuses, before the values are read, a length that the file cannot have even if it is gzipped, or that is more
    than `most_bytes`."""
    if (most := most_unpacked(path)) < length:
        found = f"{path.stat().st_size:,}, which unpack to at most {most:,}"
        raise ValueError(f"{path}: must hold {length:,} bytes {reason}, got {found}")
    if length > most_bytes:
        limit = f"{most_bytes:,} bytes, which is most_bytes"
        raise ValueError(f"{path}: must hold at most {limit}, got {length:,} {reason}")
