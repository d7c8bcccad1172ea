"""The check of rows of data and their labels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped


def check_rows(
    x: Shaped[np.ndarray, "..."],
    label: Shaped[np.ndarray, "..."] | None = None,
    *,
    data_shape: tuple[int, ...],
    labels: int | None = None,
) -> None:
    """Refuses data that a field of `data_shape` and `labels` cannot be trained on.

    **Arguments:** `x` rows of data, floating point; `label` an integer in [0, labels) for each row, or None;
    `data_shape` of one row; `labels` how many there are, or None without labels.

    **Raises:** `ValueError` that names argument, rule and value: no rows, another shape or dtype, values that are not
    finite (with the first such row), labels out of range (likewise), labels missing or not wanted.
    """
    if x.ndim < 1 or x.shape[0] == 0:
        raise ValueError(f"x must have at least one row, got shape {x.shape}")
    if x.shape[1:] != data_shape:
        raise ValueError(f"x must have rows of shape {data_shape}, got {x.shape[1:]}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}")
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise ValueError(f"x must be finite, got NaN or infinity in row {np.argmin(finite)} of {len(x)}")
    if (label is None) != (labels is None):
        raise ValueError(f"label must be given exactly if labels is, got label {label} and labels {labels}")
    if label is not None and labels is not None:
        _check_labels(label, len(x), labels)


def _check_labels(label: Shaped[np.ndarray, "..."], rows: int, labels: int) -> None:
    if label.shape != (rows,):
        raise ValueError(f"label must have one value for each of the {rows} rows, got shape {label.shape}")
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"label must be an integer, got {label.dtype}")
    wrong = (label < 0) | (label >= labels)
    if wrong.any():
        row = np.argmax(wrong)
        raise ValueError(f"label must lie in [0, {labels - 1}], got {label[row]} in row {row}")
