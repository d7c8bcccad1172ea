"""Rows in memory come back as they were given, and labels that fit nothing are refused."""

import numpy as np
import pytest

from mf_eqx.data._source import ArraySource, check_labels

X = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
LABEL = np.array([2, 0, 1, 2], np.uint8)


def test_rows_come_in_the_order_asked_for():
    rows = ArraySource(X, LABEL).take(np.array([3, 0, 3]))
    np.testing.assert_array_equal(rows.x, np.stack([X[3], X[0], X[3]]))
    np.testing.assert_array_equal(rows.label, [2, 2, 2])


def test_source_tells_shape_dtype_and_length():
    source = ArraySource(X, LABEL, labels=5)
    assert (len(source), source.row_shape, source.dtype, source.labels) == (4, (2, 3), np.float32, 5)


def test_number_of_labels_is_the_largest_and_one_more():
    assert ArraySource(X, LABEL).labels == 3


def test_source_without_labels_has_none():
    source = ArraySource(X)
    assert source.labels is None and source.take(np.array([1])).label is None


def test_labels_are_handed_out_as_int32():
    assert ArraySource(X, LABEL).take(np.array([0])).label.dtype == np.int32


def test_number_of_labels_without_labels_is_refused():
    with pytest.raises(ValueError, match="arrays: label must be given with labels = 3, got None"):
        ArraySource(X, labels=3)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"digits: x must have at least one row, got shape \(0, 2, 3\)"):
        ArraySource(X[:0], name="digits")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (LABEL[:3], r"file: label must have one value for each of the 4 rows, got shape \(3,\)"),
        (LABEL.astype(float), "file: label must be an integer, got float64"),
        (np.array([0, 1, 3, 0]), r"file: label must lie in \[0, 2\], got 3 in row 2"),
        (np.array([0, -1, 1, 0]), r"file: label must lie in \[0, 2\], got -1 in row 1"),
    ],
)
def test_bad_labels_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        check_labels("file", label, 4, 3)
