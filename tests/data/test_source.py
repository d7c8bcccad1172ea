"""Rows in memory come back as they were given, and labels that fit nothing are refused."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx.data._source import AbstractSource, ArraySource, count_labels, JoinedSource, Rows
from mf_eqx.data._stream import Stream

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


@pytest.mark.parametrize("labels", [None, 2**33])
def test_labels_that_int32_would_fold_into_others_are_refused(labels):
    label = np.array([0, 1, 2**32, 2**32 + 1])
    with pytest.raises(ValueError, match="arrays: label"):
        ArraySource(X, label, labels=labels)


def test_largest_label_of_int32_is_handed_out_as_it_is():
    label = np.array([0, 2**31 - 1, 1, 0], np.uint64)
    assert ArraySource(X, label).take(np.arange(4)).label.tolist() == label.tolist()


def test_rows_in_another_byte_order_are_handed_out_in_the_native_one():
    source = ArraySource(X.astype(">f4"))
    found = source.take(np.arange(4)).x
    assert source.dtype.isnative and found.dtype == source.dtype
    np.testing.assert_array_equal(found, X)


def test_labels_may_be_an_array_of_jax():
    source = ArraySource(np.zeros((4, 2), np.float32), jnp.array([0, 2, 1, 2]))
    assert source.labels == 3
    np.testing.assert_array_equal(source.take(np.array([1, 2])).label, [2, 1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("parts", ["a", ["a"], ArraySource(np.zeros((4, 2)))], ids=["text", "texts", "source"])
def test_parts_that_are_no_sources_are_refused(parts):
    with pytest.raises(ValueError, match=r"part(s)? must be (an instance of AbstractSource|a tuple or a list)"):
        JoinedSource(parts, name="joined")


def test_number_of_labels_without_labels_is_refused():
    with pytest.raises(ValueError, match="arrays: label must be given with labels = 3, got None"):
        ArraySource(X, labels=3)


def test_rows_may_be_an_array_of_jax_and_no_list(unchecked):
    source = ArraySource(jnp.asarray(X))
    assert isinstance(source.take(np.arange(2)).x, np.ndarray)
    with pytest.raises(ValueError, match=r"arrays: x must be an array, got \[\[1\.0\]\]"):
        ArraySource([[1.0]])


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"digits: x must have at least one row and .* got shape \(0, 2, 3\)"):
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
        count_labels("file", label, 4, 3)


# Several as one


def pieces(*lengths, labelled=True):
    """Sources of so many rows, all different, named a, b, ..."""
    draws, found = np.random.default_rng(0), []
    for name, length in zip("abcdef", lengths, strict=False):
        x = draws.standard_normal((length, 2, 3)).astype(np.float32)
        label = draws.integers(0, 3, length) if labelled else None
        found.append(ArraySource(x, label, labels=3 if labelled else None, name=name))
    return found


def joined(*lengths, **options):
    return JoinedSource(pieces(*lengths, **options), name="all")


def test_joined_source_is_the_concatenation_in_any_order():
    parts, draws = pieces(3, 1, 4), np.random.default_rng(1)
    source = JoinedSource(parts, name="all")
    x, label = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "label"))
    for rows in (np.arange(8), draws.permutation(8), draws.integers(0, 8, 20), np.array([7]), np.array([], np.int64)):
        found = source.take(rows)
        np.testing.assert_array_equal(found.x, x[rows])
        np.testing.assert_array_equal(found.label, label[rows])
    assert (found.x.dtype, found.label.dtype) == (np.float32, np.int32)


def test_joined_source_tells_name_shape_dtype_labels_and_length():
    source = joined(3, 1, 4)
    assert (source.name, len(source), source.row_shape) == ("all", 8, (2, 3))
    assert (source.dtype, source.labels) == (np.float32, 3)


def test_names_of_classes_are_as_many_as_labels():
    assert ArraySource(X, LABEL, class_names=("a", "b", "c", "d")).labels == 4
    with pytest.raises(ValueError, match="arrays: class_names must be 4, one for each label, got 3"):
        ArraySource(X, LABEL, labels=4, class_names=[*"abc"])
    with pytest.raises(ValueError, match="arrays: class_names must be None without labels, got 3"):
        ArraySource(X, class_names=[*"abc"])


@pytest.mark.parametrize("names", ["abcd", [1, 2, 3, 4], [b"a", b"b", b"c", b"d"]])
def test_names_of_classes_that_are_no_texts_are_refused(unchecked, names):
    with pytest.raises(ValueError, match="arrays: class_names must be a text for each label, got"):
        ArraySource(X, LABEL, class_names=names)


def test_joined_source_has_the_names_of_classes_that_all_its_parts_have():
    parts = [ArraySource(X, LABEL, class_names=names) for names in ([*"abc"], (*"abc",), [*"abd"])]
    assert JoinedSource(parts[:2], name="all").class_names == ("a", "b", "c")
    assert JoinedSource(parts, name="all").class_names is None


def test_joined_source_without_labels_has_none():
    source = joined(3, 1, labelled=False)
    assert source.labels is None and source.take(np.array([3, 0])).label is None


def test_joined_source_may_be_one_and_may_be_joined_again():
    one, nested = joined(3), JoinedSource([joined(3), joined(3)], name="twice")
    np.testing.assert_array_equal(one.take(np.array([2, 0])).x, one.take(np.array([0, 2])).x[::-1])
    np.testing.assert_array_equal(nested.take(np.array([5, 0])).x, one.take(np.array([2, 0])).x)


def with_digests(*digests):
    parts = pieces(*[2] * len(digests))
    for part, digest in zip(parts, digests, strict=True):
        part.digest = digest
    return JoinedSource(parts, name="all").digest


def test_digest_of_joined_sources_is_that_of_their_digests_in_order():
    one, two = (hashlib.sha256(name).hexdigest() for name in (b"one", b"two"))
    assert with_digests(one, two) == hashlib.sha256((one + two).encode()).hexdigest()
    assert len({with_digests(one, two), with_digests(two, one), with_digests(one), with_digests(one, one)}) == 4


def test_joined_source_has_no_digest_unless_all_its_parts_have_one():
    assert with_digests("0" * 64, None) is None and with_digests(None) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (ArraySource(X[:, 0], LABEL, name="b"), r"b: row_shape must be \(2, 3\) as in a, got \(3,\)"),
        (ArraySource(X.astype(float), LABEL, name="b"), "b: dtype must be float32 as in a, got float64"),
        (ArraySource(X, LABEL, labels=4, name="b"), "b: labels must be 3 as in a, got 4"),
        (ArraySource(X, name="b"), "b: labels must be 3 as in a, got None"),
    ],
)
def test_sources_that_differ_are_refused_with_both_names(other, message):
    with pytest.raises(ValueError, match=message):
        JoinedSource([*pieces(2), ArraySource(X, LABEL, name="between"), other], name="all")


def test_no_sources_are_refused():
    with pytest.raises(ValueError, match="all: parts must be at least one source, got none"):
        JoinedSource([], name="all")


class Faulty(AbstractSource):
    """Gives something else than it says."""

    def __init__(self, rows):
        self.name, self.row_shape, self.dtype, self.labels, self.rows = "b", (2, 3), X.dtype, 3, rows

    def __len__(self):
        return 4

    def take(self, rows):
        return Rows(self.rows.x[rows], self.rows.label[rows] if len(self.rows.label) == len(X) else self.rows.label)


def test_own_source_that_lacks_what_others_need_is_refused():
    source = Faulty(Rows(X, LABEL))
    source.dtype = np.float32
    with pytest.raises(ValueError, match=r"source\.dtype must be an instance of dtype, got <class 'numpy\.float32'>"):
        Stream(source, batch=2)
    del source.labels
    with pytest.raises(ValueError, match="source must have name, row_shape, dtype and labels, got no labels"):
        Stream(source, batch=2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows(X, np.array([0, 1, 2**32, 0])), r"all: label must lie in \[0, 2\], got 4294967296 in row 6"),
        (Rows(X, LABEL.astype(float)), r"b: label must be integers of shape \(4,\), got float64 of shape \(4,\)"),
        (Rows(X, LABEL[:1]), r"b: label must be integers of shape \(4,\), got uint8 of shape \(1,\)"),
        (Rows(X.astype(np.float64), LABEL), r"b: x must be float32 of shape \(4, 2, 3\), got float64"),
        (Rows(X[:, :1], LABEL), r"b: x must be float32 of shape \(4, 2, 3\), got float32 of shape \(4, 1, 3\)"),
    ],
    ids=["label", "label dtype", "label shape", "dtype", "shape"],
)
def test_part_that_gives_something_else_is_refused_before_it_is_cast(rows, message):
    source = JoinedSource([*pieces(4), Faulty(rows)], name="all")
    with pytest.raises(ValueError, match=message):
        source.take(np.arange(8))
