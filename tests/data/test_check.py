"""Data that cannot be trained on is refused in one line; all other data are not."""

import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx.data import check_rows

X = np.zeros((4, 1, 8, 8), np.float32)
LABEL = np.array([0, 9, 3, 1])


def broken(x, row, value):
    x = x.copy()
    x[row] = value
    return x


def test_good_rows_pass():
    check_rows(X, LABEL, data_shape=(1, 8, 8), labels=10)
    check_rows(X, data_shape=(1, 8, 8))


def test_bfloat16_rows_pass():
    check_rows(X.astype(jnp.bfloat16), data_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:0], r"x must have at least one row, got shape \(0, 1, 8, 8\)"),
        (X[..., :7], r"x must have rows of shape \(1, 8, 8\), got \(1, 8, 7\)"),
        (X.astype(np.int16), "x must be floating point or uint8, got int16"),
        (broken(X, 2, np.nan), "x must be finite, got NaN or infinity in row 2"),
        (broken(X, 3, np.inf), "x must be finite, got NaN or infinity in row 3"),
    ],
)
def test_bad_rows_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        check_rows(x, LABEL, data_shape=(1, 8, 8), labels=10)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (broken(LABEL, 1, 10), r"label must lie in \[0, 9\], got 10 in row 1"),
        (broken(LABEL, 3, -1), r"label must lie in \[0, 9\], got -1 in row 3"),
        (LABEL[:3], r"label must have one value for each of the 4 rows, got shape \(3,\)"),
        (LABEL.astype(float), "label must be an integer, got float64"),
        (None, "label must be given exactly if labels is"),
    ],
)
def test_bad_labels_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        check_rows(X, label, data_shape=(1, 8, 8), labels=10)


def test_labels_without_a_number_of_labels_are_refused():
    with pytest.raises(ValueError, match="label must be given exactly if labels is"):
        check_rows(X, LABEL, data_shape=(1, 8, 8))
