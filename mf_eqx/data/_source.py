"""Sources of rows: a source knows its number of rows and reads any of them by their numbers."""

import abc
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree, Shaped

from .._validate import as_tuple, check_kind, Count
from . import _check, _condition
from ._condition import RowCondition


class Rows(NamedTuple):
    """Rows of a data set, on the host.

    **Arguments:** `x` their data, channels first for images; `label` an integer for each row, or None; `condition`
    another condition, a PyTree of arrays with a leading row axis, or None. At most one of `label` and `condition` is
    given.
    """

    x: Shaped[np.ndarray, "rows *data"]
    label: Int[np.ndarray, " rows"] | None = None
    condition: PyTree[Shaped[np.ndarray, "rows ..."]] = None


class AbstractSource(abc.ABC):
    """A data set whose rows are read by number. Several threads may use one source at the same time.

    **Attributes:** A subclass sets `name`, with which error messages begin; `row_shape` and `dtype` of one row's data,
    the latter an `np.dtype`; and `labels`, how many different labels there are, numbered from 0, at most 2^31, or None
    without labels. The others are None unless it sets them: `row_condition` the shapes and dtypes of one row's other
    condition; `class_names`, one for each label; `digest` of all data if it is known without reading them.
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: np.dtype
    labels: int | None
    row_condition: RowCondition = None
    class_names: Sequence[str] | None = None
    digest: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abc.abstractmethod
    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        """The rows with these numbers, each in [0, length), in this order."""


class ArraySource(AbstractSource):
    """Rows in memory.

    **Arguments:**

    - `x`: data with a leading row axis.
    - `label`: an integer for each row, or None.
    - `condition`: what a field is conditioned on if it is no label: a PyTree of arrays with the same leading axis, such
      as one vector for each row, or a dictionary of arrays. Labels may be among them; they are then integers like
      others, whose range is not checked. None for data with labels, or without conditions.
    - `labels`: how many different labels there are, by default as many as `class_names`, or the largest one plus 1.
    - `class_names`: what the labels mean, or None.
    - `name`: of the source in error messages.

    **Raises:** `ValueError` if `x` is no array, if there are no rows or empty ones, if `label` has another length or
    dtype than required, or values outside of [0, labels) or of int32, if there are not as many `class_names` as labels,
    or if an array of `condition` has another length or is not of numbers.
    """

    def __init__(
        self,
        x: Shaped[Array | np.ndarray, "rows *data"],
        label: Any = None,
        *,
        condition: PyTree[Any] = None,
        labels: Count | None = None,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
    ):
        if not hasattr(x, "shape"):
            raise ValueError(f"{name}: x must be an array, got {x!r:.100}")
        x = np.asarray(x) if isinstance(x, jax.Array) else x
        if x.ndim < 1 or 0 in x.shape:
            raise ValueError(f"{name}: x must have at least one row and no empty axis, got shape {x.shape}")
        if label is None and labels is not None:
            raise ValueError(f"{name}: label must be given with labels = {labels}, got None")
        _check_kind(name, label, condition)
        label = np.asarray(label) if isinstance(label, jax.Array) else label
        if label is not None and labels is None and class_names is not None:
            labels = len(class_names)
        self.name, self.x, self.row_shape, self.dtype = name, x, x.shape[1:], x.dtype.newbyteorder("=")
        self.label, self.labels = label, None if label is None else count_labels(name, label, len(x), labels)
        with name_in_errors(name):
            self.class_names = check_class_names(class_names, self.labels)
            self.condition = None if condition is None else _condition.as_arrays(condition, len(x))
        self.row_condition = _condition.row_of(self.condition)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x = self.x[rows].astype(self.dtype, copy=False)
        label = None if self.label is None else self.label[rows].astype(np.int32)
        return Rows(x, label, _condition.take(self.condition, self.row_condition, rows))


def _check_kind(name: str, label: Any, condition: Any) -> None:
    """Refuses a label beside another condition, and anything but an integer for each row in the place of a label.

    **Arguments:** `name` of the source; `label`, `condition` as given, or None.
    """
    if label is not None and condition is not None:
        raise ValueError(f"{name}: label must be None with a condition, which may hold labels too, got both")
    if label is None:
        return
    dtype = getattr(label, "dtype", None)
    if dtype is None or not np.issubdtype(dtype, np.integer) or label.ndim != 1:
        found = type(label).__name__ if dtype is None else f"{dtype} of shape {label.shape}"
        rule = "an array of one integer for each row (pass any other condition as condition=...)"
        raise ValueError(f"{name}: label must be {rule}, got {found}")


def count_labels(name: str, label: Shaped[np.ndarray, "..."], rows: int, labels: Count | None) -> int:
    """How many different labels there are. Refuses anything but an integer in [0, labels) for each row.

    **Arguments:** `name` of the file or source, put in front of error messages; `label` the labels; `rows` how many
    there must be; `labels` how many different ones there are, or None for the largest one plus 1.
    """
    with name_in_errors(name):
        return _check.check_labels(label, rows, labels)


def check_class_names(class_names: Sequence[str] | None, labels: int | None) -> tuple[str, ...] | None:
    """The names as a tuple. Refuses anything but a text for each label."""
    if class_names is None:
        return None
    if labels is None:
        raise ValueError(f"class_names must be None without labels, got {len(class_names)}")
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names must be a text for each label, got {class_names!r:.80}")
    if len(class_names) != labels:
        raise ValueError(f"class_names must be {labels}, one for each label, got {len(class_names)}")
    return tuple(class_names)


@contextlib.contextmanager
def name_in_errors(name: str) -> Iterator[None]:
    """A context that puts `name` in front of the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_source(source: AbstractSource) -> None:
    """Refuses a source on which nothing can be trained, judged by its attributes alone."""
    check_kind("source", source, AbstractSource)
    if lacking := [name for name in ("name", "row_shape", "dtype", "labels") if not hasattr(source, name)]:
        raise ValueError(f"source must have name, row_shape, dtype and labels, got no {lacking[0]}")
    if source.dtype != np.uint8:  # which may be the class of NumPy as well
        check_kind("source.dtype", source.dtype, np.dtype)
    with name_in_errors(source.name):
        if len(source) < 1 or 0 in source.row_shape:
            found = f"{len(source)} of shape {source.row_shape}"
            raise ValueError(f"must have at least one row and no empty axis, got {found}")
        _check.check_dtype(source.dtype)
        if source.labels is not None:
            _check.as_label_count(source.labels)
        check_class_names(source.class_names, source.labels)
        if source.labels is not None and source.row_condition is not None:
            raise ValueError(f"labels must be None with a row_condition, got {source.labels}")
        _condition.check_row_condition(source.row_condition)


def check_taken(source: AbstractSource, rows: Int[np.ndarray, " rows"], taken: Rows) -> None:
    """Refuses rows that differ from the attributes of `source`, labels that do not fit, and values that are not finite.

    **Arguments:** `source`; `rows` the numbers of the rows; `taken` what `source.take` returned for them.
    """
    _check_shape_and_dtype(source, rows, taken)
    with name_in_errors(source.name):
        _check.check_finite_rows(taken.x, rows)
        if taken.label is not None:
            _check.check_labels(taken.label, len(rows), source.labels, rows)
        _condition.check_values(taken.condition, rows)


def _check_shape_and_dtype(source: AbstractSource, rows: Int[np.ndarray, " rows"], taken: Rows) -> None:
    """Refuses rows, labels and conditions of another shape or dtype than `source` declares: writing them into an array
    would broadcast or cast them without an error."""
    x, label, shape = taken.x, taken.label, (len(rows), *source.row_shape)
    if x.shape != shape or x.dtype != source.dtype:
        wanted = f"{source.dtype} of shape {shape}"
        raise ValueError(f"{source.name}: x must be {wanted}, got {x.dtype} of shape {x.shape}")
    if (label is None) != (source.labels is None):
        found = "no label" if label is None else "a label"
        raise ValueError(
            f"{source.name}: label must be given if and only if labels is, got {found} with labels = {source.labels}"
        )
    if label is not None and (label.dtype.kind not in "iu" or label.shape != shape[:1]):
        wanted = f"integers of shape {shape[:1]}"
        raise ValueError(f"{source.name}: label must be {wanted}, got {label.dtype} of shape {label.shape}")
    with name_in_errors(source.name):
        _condition.check_like(taken.condition, source.row_condition, len(rows))


class JoinedSource(AbstractSource):
    """All rows of several sources, one source after the other.

    **Arguments:** `parts` the sources, at least one, of the same row shape, dtype, number of labels and kind of
    condition; `name` of the joined source in error messages. Names of classes are those that all parts have.

    **Raises:** `ValueError` if the parts differ, with the names of two that do; from `take`, if a part returns rows of
    another shape or dtype than it declares, or labels that do not fit.
    """

    def __init__(self, parts: Sequence[AbstractSource], *, name: str):
        parts = as_tuple(f"{name}: parts", parts, ("source", "other"))
        if not parts:
            raise ValueError(f"{name}: parts must be at least one source, got none")
        for part in parts:
            check_kind(f"{name}: a part", part, AbstractSource)
        first = parts[0]
        for part in parts[1:]:
            for attribute in ("row_shape", "dtype", "labels", "row_condition"):
                if (found := getattr(part, attribute)) != (wanted := getattr(first, attribute)):
                    raise ValueError(f"{part.name}: {attribute} must be {wanted} as in {first.name}, got {found}")
        self._parts, self._ends = list(parts), np.cumsum([len(part) for part in parts])
        self.name, self.row_shape, self.dtype, self.labels = name, first.row_shape, first.dtype, first.labels
        self.row_condition = first.row_condition
        names = {None if part.class_names is None else tuple(part.class_names) for part in parts}
        self.class_names = names.pop() if len(names) == 1 else None
        digests = [part.digest for part in parts if part.digest is not None]
        if len(digests) == len(parts):
            self.digest = hashlib.sha256("".join(digests).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: Int[np.ndarray, " rows"]) -> Rows:
        x = np.empty((len(rows), *self.row_shape), self.dtype)
        label = None if self.labels is None else np.empty(len(rows), np.int64)  # larger values would overflow int32
        condition = jax.tree.map(lambda like: np.empty((len(rows), *like.shape), like.dtype), self.row_condition)
        owner = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(owner):
            part, positions = self._parts[number], np.flatnonzero(owner == number)
            rows_of_part = rows[positions] - (self._ends[number] - len(part))
            taken = part.take(rows_of_part)
            _check_shape_and_dtype(part, rows_of_part, taken)
            x[positions] = taken.x
            if label is not None:
                label[positions] = taken.label
            for leaf, part_leaf in zip(*map(jax.tree.leaves, (condition, taken.condition)), strict=True):
                leaf[positions] = part_leaf
        if label is None:
            return Rows(x, None, condition)
        with name_in_errors(self.name):
            _check.check_labels(label, len(rows), self.labels, rows)
        return Rows(x, label.astype(np.int32))
