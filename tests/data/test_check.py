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
        (X[:0], r"x must have at least one row and no empty axis, got shape \(0, 1, 8, 8\)"),
        (X[..., :7], r"x must have rows of shape \(1, 8, 8\), got \(1, 8, 7\)"),
        (X.astype(np.int16), "x must be uint8 or floating point of at most 64 bits, got int16"),
        (X.astype(np.longdouble), "x must be uint8 or floating point of at most 64 bits, got float128"),
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
        (None, "label must be given if and only if labels is"),
    ],
)
def test_bad_labels_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        check_rows(X, label, data_shape=(1, 8, 8), labels=10)


def test_labels_without_a_number_of_labels_are_refused():
    with pytest.raises(ValueError, match="label must be given if and only if labels is"):
        check_rows(X, LABEL, data_shape=(1, 8, 8))


def test_rows_without_values_are_refused():
    with pytest.raises(ValueError, match=r"x must have at least one row and no empty axis, got shape \(4, 0\)"):
        check_rows(np.zeros((4, 0)), data_shape=(0,))


# What is used: float32 for float64, int32 for labels


def test_float64_that_is_infinite_in_float32_is_refused():
    x = broken(X.astype(np.float64), 2, 1e39)
    with pytest.raises(ValueError, match=r"x must be finite as float32, .* got 1e\+39 in row 2"):
        check_rows(x, data_shape=(1, 8, 8))


def test_float64_that_is_nan_is_refused_as_such():
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity in row 2"):
        check_rows(broken(X.astype(np.float64), 2, np.nan), data_shape=(1, 8, 8))


def test_float64_that_float32_holds_passes():
    check_rows(broken(X.astype(np.float64), 2, 3e38), data_shape=(1, 8, 8))


def test_float64_of_any_size_passes_where_jax_keeps_it(x64):
    check_rows(broken(X.astype(np.float64), 2, 1e39), data_shape=(1, 8, 8))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32])
def test_label_that_int32_does_not_hold_is_refused(dtype):
    label = broken(LABEL.astype(dtype), 2, 2**31)
    with pytest.raises(ValueError, match=r"label must lie in \[0, 2147483647\], got 2147483648 in row 2"):
        check_rows(X, label, data_shape=(1, 8, 8), labels=2**31)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (0, "labels must be an integer >= 1, got 0"),
        (2**31 + 1, "labels must be at most 2147483648, since a label is used as int32, got 2147483649"),
        (True, "labels must be an integer >= 1, got True"),
        (2.5, "labels must be an integer >= 1, got 2.5"),
    ],
)
def test_what_is_no_number_of_labels_is_refused(unchecked, labels, message):
    with pytest.raises(ValueError, match=message):
        check_rows(X, LABEL, data_shape=(1, 8, 8), labels=labels)
