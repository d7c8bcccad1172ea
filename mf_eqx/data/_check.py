"""The check of rows of data and their labels.

Values are checked in the dtype in which they are used: labels as int32, and rows in the dtype to which JAX converts
them, which is float32 for float64 without `jax_enable_x64`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from .._validate import as_count, Count

_MOST_LABELS = 1 << 31
"""With so many labels, the largest one is the largest int32."""


def as_label_count(labels: Count) -> int:
    """A number of different labels as an int. **Raises:** `ValueError` unless labels 0 to `labels` - 1 are int32."""
    labels = as_count("labels", labels)
    if labels > _MOST_LABELS:
        raise ValueError(f"labels must be at most {_MOST_LABELS}, since a label is used as int32, got {labels}")
    return labels


def check_rows(
    x: Shaped[np.ndarray, "..."],
    label: Shaped[np.ndarray, "..."] | None = None,
    *,
    data_shape: tuple[int, ...],
    labels: Count | None = None,
    numbers: Int[np.ndarray, " rows"] | None = None,
) -> None:
    """Refuses data on which a field of `data_shape` and `labels` cannot be trained.

    **Arguments:** `x` rows of data, uint8 pixels or floating point of at most 64 bits; `label` an integer in [0,
    labels) for each row, or None; `data_shape` of one row; `labels` how many different labels there are, at most 2^31,
    or None without labels; `numbers` of the rows in error messages, by default 0, 1, ...

    **Raises:** `ValueError` that names argument, rule and value: no rows or empty ones, another shape or dtype, values
    that are not finite in the dtype in which JAX uses them (with the first such row), labels out of range (likewise),
    labels that are missing or unexpected.
    """
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x must have at least one row and no empty axis, got shape {x.shape}")
    if x.shape[1:] != data_shape:
        raise ValueError(f"x must have rows of shape {data_shape}, got {x.shape[1:]}")
    check_dtype(x.dtype)
    check_finite_rows(x, np.arange(len(x)) if numbers is None else numbers)
    if (label is None) != (labels is None):
        found = "no label" if label is None else "a label"
        raise ValueError(f"label must be given if and only if labels is, got {found} with labels = {labels}")
    if label is not None and labels is not None:
        check_labels(label, len(x), labels, numbers)


def check_dtype(dtype: np.dtype) -> None:
    """Refuses a dtype of data on which nothing can be trained."""
    if dtype != np.uint8 and not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 8):
        raise ValueError(f"x must be uint8 or floating point of at most 64 bits, got {dtype}")


def check_finite_rows(x: Shaped[np.ndarray, "rows *data"], numbers: Int[np.ndarray, " rows"], name: str = "x") -> None:
    """Refuses values that are not finite in the dtype in which they reach the device. Arguments: rows of data, their
    numbers in error messages, and the name of the data there."""
    if x.dtype == np.uint8:
        return
    used = jax.dtypes.canonicalize_dtype(x.dtype)
    with np.errstate(over="ignore"):
        finite = np.isfinite(x.astype(used, copy=False)).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        row = np.argmin(finite)
        if not np.isfinite(x[row]).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in row {numbers[row]}")
        found = f"{np.abs(x[row]).max():.3g} in row {numbers[row]}"
        raise ValueError(f"{name} must be finite as {used}, which JAX uses without jax_enable_x64, got {found}")


def check_labels(
    label: Shaped[np.ndarray, "..."],
    rows: int,
    labels: Count | None = None,
    numbers: Int[np.ndarray, " rows"] | None = None,
) -> int:
    """How many different labels there are, by default the largest one plus 1. Refuses labels that are not one integer
    in [0, labels) for each row, or that do not fit into int32. Arguments as for `check_rows`."""
    if label.shape != (rows,):
        raise ValueError(f"label must have one value for each of the {rows} rows, got shape {label.shape}")
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"label must be an integer, got {label.dtype}")
    number = _MOST_LABELS if labels is None else as_label_count(labels)
    wrong = (label < 0) | (label >= number)
    if wrong.any():
        row = int(np.argmax(wrong))
        shown = row if numbers is None else numbers[row]
        raise ValueError(f"label must lie in [0, {number - 1}], got {label[row]} in row {shown}")
    return int(label.max()) + 1 if labels is None else number
