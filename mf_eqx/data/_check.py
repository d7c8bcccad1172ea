"""The check of rows of data and their labels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped


def check_rows(
    x: Shaped[np.ndarray, "..."],
    label: Shaped[np.ndarray, "..."] | None = None,
    *,
    data_shape: tuple[int, ...],
    labels: int | None = None,
    numbers: Int[np.ndarray, " rows"] | None = None,
) -> None:
    """Refuses data that a field of `data_shape` and `labels` cannot be trained on.

    **Arguments:** `x` rows of data, floating point or uint8 pixels; `label` an integer in [0, labels) for each row, or
    None; `data_shape` of one row; `labels` how many there are, or None without labels; `numbers` that messages call the
    rows by, by default 0, 1, ...

    **Raises:** `ValueError` that names argument, rule and value: no rows, another shape or dtype, values that are not
    finite (with the first such row), labels out of range (likewise), labels missing or not wanted.
    """
    if x.ndim < 1 or x.shape[0] == 0:
        raise ValueError(f"x must have at least one row, got shape {x.shape}")
    if x.shape[1:] != data_shape:
        raise ValueError(f"x must have rows of shape {data_shape}, got {x.shape[1:]}")
    _check_values(x, np.arange(len(x)) if numbers is None else numbers)
    if (label is None) != (labels is None):
        raise ValueError(f"label must be given exactly if labels is, got label {label} and labels {labels}")
    if label is not None and labels is not None:
        check_labels(label, len(x), labels, numbers)


def _check_values(x: Shaped[np.ndarray, "..."], numbers: Int[np.ndarray, " rows"]) -> None:
    if x.dtype == np.uint8:
        return
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point or uint8, got {x.dtype}")
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise ValueError(f"x must be finite, got NaN or infinity in row {numbers[np.argmin(finite)]}")


def check_labels(
    label: Shaped[np.ndarray, "..."],
    rows: int,
    labels: int | None = None,
    numbers: Int[np.ndarray, " rows"] | None = None,
) -> int:
    """How many labels there are, by default the largest and one more. Refuses labels that are not one integer in
    [0, labels) for each row; arguments as of `check_rows`."""
    if label.shape != (rows,):
        raise ValueError(f"label must have one value for each of the {rows} rows, got shape {label.shape}")
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"label must be an integer, got {label.dtype}")
    number = int(label.max()) + 1 if labels is None else labels
    wrong = (label < 0) | (label >= number)
    if wrong.any():
        row = int(np.argmax(wrong))
        shown = row if numbers is None else numbers[row]
        raise ValueError(f"label must lie in [0, {number - 1}], got {label[row]} in row {shown}")
    return number
