"""Where rows come from: anything that has a number of rows and reads those that it is asked for."""

import abc
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from .._validate import Count
from . import _check


class Rows(NamedTuple):
    """Some rows of a data set on the host.

    **Arguments:** `x` data, channels first for images; `label` an integer for each row, or None.
    """

    x: Shaped[np.ndarray, "rows *data"]
    label: Int[np.ndarray, " rows"] | None = None


class AbstractSource(abc.ABC):
    """A data set, read by row numbers. Threads may share one.

    **Attributes:** `name` what messages call it; `row_shape` and `dtype` of one row's data; `labels` how many different
    labels there are, from 0, at most 2^31, or None without labels; `digest` of all data where it is known without
    reading them, or None.
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: np.dtype
    labels: int | None
    digest: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abc.abstractmethod
    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        """The rows of these numbers, each in [0, length), in this order."""


class ArraySource(AbstractSource):
    """Rows in memory.

    **Arguments:**

    - `x`: data with a leading row axis.
    - `label`: an integer for each row, or None.
    - `labels`: how many there are, by default the largest and one more.
    - `name`: what messages call it.

    **Raises:** `ValueError` if there are no rows or empty ones, if `label` has another length or dtype, or lies outside
    [0, labels) or int32.
    """

    def __init__(
        self,
        x: Shaped[np.ndarray, "rows *data"],
        label: Shaped[np.ndarray, " rows"] | None = None,
        *,
        labels: Count | None = None,
        name: str = "arrays",
    ):
        if x.ndim < 1 or 0 in x.shape:
            raise ValueError(f"{name}: x must have at least one row and nothing empty, got shape {x.shape}")
        if label is None and labels is not None:
            raise ValueError(f"{name}: label must be given with labels = {labels}, got None")
        self.name, self.x, self.row_shape, self.dtype = name, x, x.shape[1:], x.dtype.newbyteorder("=")
        self.label, self.labels = label, None if label is None else check_labels(name, label, len(x), labels)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x = self.x[rows].astype(self.dtype, copy=False)
        return Rows(x, None if self.label is None else self.label[rows].astype(np.int32))


def check_labels(name: str, label: Shaped[np.ndarray, "..."], rows: int, labels: Count | None) -> int:
    """How many labels there are; refuses anything but an integer in [0, labels) for each row.

    **Arguments:** `name` of the file or source, in front of the message; `label`; `rows` that it must have; `labels`,
    or None for the largest label and one more.
    """
    with _named(name):
        return _check.check_labels(label, rows, labels)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts `name` in front of the message of a refusal."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_source(source: AbstractSource) -> None:
    """Refuses a source that nothing can be trained on, by what it says of itself."""
    with _named(source.name):
        if len(source) < 1 or 0 in source.row_shape:
            found = f"{len(source)} of shape {source.row_shape}"
            raise ValueError(f"must have at least one row and nothing empty, got {found}")
        _check.check_dtype(source.dtype)
        if source.labels is not None:
            _check.as_labels(source.labels)


def check_taken(source: AbstractSource, rows: Int[np.ndarray, " rows"], taken: Rows) -> None:
    """Refuses rows that are not what `source` says, labels that do not fit, and values that are not finite.

    **Arguments:** `source`; `rows` the numbers that it was asked for; `taken` what it gave.
    """
    _check_form(source, rows, taken)
    with _named(source.name):
        _check.check_finite(taken.x, rows)
        if taken.label is not None:
            _check.check_labels(taken.label, len(rows), source.labels, rows)


def _check_form(source: AbstractSource, rows: Int[np.ndarray, " rows"], taken: Rows) -> None:
    """Refuses what would become something else when it is put into arrays of the right shape and dtype."""
    x, label, shape = taken.x, taken.label, (len(rows), *source.row_shape)
    if x.shape != shape or x.dtype != source.dtype:
        wanted = f"{source.dtype} of shape {shape}"
        raise ValueError(f"{source.name}: x must be {wanted}, got {x.dtype} of shape {x.shape}")
    if (label is None) != (source.labels is None):
        found = "none" if label is None else "some"
        raise ValueError(
            f"{source.name}: label must be given exactly if labels is, got {found} with labels {source.labels}"
        )
    if label is not None and (label.dtype.kind not in "iu" or label.shape != shape[:1]):
        wanted = f"integers of shape {shape[:1]}"
        raise ValueError(f"{source.name}: label must be {wanted}, got {label.dtype} of shape {label.shape}")


class JoinedSource(AbstractSource):
    """All rows of several sources, those of the first to be first.

    **Arguments:** `parts` at least one, of the same row shape, dtype and number of labels; `name` what messages call
    all of them.

    **Raises:** `ValueError` if they differ, with the names of two that do; when rows are taken, if a part gives others
    than it says, or labels that do not fit.
    """

    def __init__(self, parts: Sequence[AbstractSource], *, name: str):
        if not parts:
            raise ValueError(f"{name}: parts must be at least one source, got none")
        first = parts[0]
        for part in parts[1:]:
            for what in ("row_shape", "dtype", "labels"):
                if (found := getattr(part, what)) != (wanted := getattr(first, what)):
                    raise ValueError(f"{part.name}: {what} must be {wanted} as in {first.name}, got {found}")
        self._parts, self._ends = list(parts), np.cumsum([len(part) for part in parts])
        self.name, self.row_shape, self.dtype, self.labels = name, first.row_shape, first.dtype, first.labels
        digests = [part.digest for part in parts if part.digest is not None]
        if len(digests) == len(parts):
            self.digest = hashlib.sha256("".join(digests).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x = np.empty((len(rows), *self.row_shape), self.dtype)
        label = None if self.labels is None else np.empty(len(rows), np.int64)  # int32 would fold large ones
        owner = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(owner):
            part, places = self._parts[number], np.flatnonzero(owner == number)
            wanted = rows[places] - (self._ends[number] - len(part))
            got = part.take(wanted)
            _check_form(part, wanted, got)
            x[places] = got.x
            if label is not None:
                label[places] = got.label
        if label is None:
            return Rows(x)
        with _named(self.name):
            _check.check_labels(label, len(rows), self.labels, rows)
        return Rows(x, label.astype(np.int32))
