"""Rows in ArrayRecord files come back as they were written; every record is held against the first."""

import io
import pickle
import sys
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from damage import flipped, flips, given, opens_or_is_refused, QUICK, read_all, st

from mf_eqx._optional import MissingDependency
from mf_eqx.data._array_record import ArrayRecordSource, decode_npy

module = pytest.importorskip("array_record.python.array_record_module")

RANDOM = np.random.default_rng(3)
X = RANDOM.normal(size=(9, 2, 3)).astype(np.float32)
LABEL = RANDOM.integers(0, 4, 9)


def npy(x):
    stream = io.BytesIO()
    np.save(stream, x)
    return stream.getvalue()


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


LABELLED = [npz(x=x, label=label) for x, label in zip(X, LABEL, strict=True)]
PLAIN = [npy(x) for x in X]


def written(path, records, options="group_size:1"):
    writer = module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("array_record")


@pytest.fixture(scope="module")
def shards(folder):
    return [written(folder / f"{start}", LABELLED[start : start + 4]) for start in (0, 4, 8)]


def test_records_without_label_give_rows_without(tmp_path):
    source = ArrayRecordSource(written(tmp_path / "rows", PLAIN))
    np.testing.assert_array_equal(read_all(source).x, X)


@QUICK
@given(rows=st.lists(st.integers(0, 8), max_size=12))
def test_shards_are_gathered_as_one_array(rows, shards):
    rows = np.array(rows, int)
    got = ArrayRecordSource(shards, labels=4).take(rows)
    np.testing.assert_array_equal(got.x, X[rows])
    np.testing.assert_array_equal(got.label, LABEL[rows])


@pytest.mark.parametrize("options", ["group_size:1", "group_size:4", "group_size:1,uncompressed"])
def test_files_of_other_options_are_read(options, tmp_path):
    source = ArrayRecordSource(written(tmp_path / "rows", LABELLED, options), labels=4)
    np.testing.assert_array_equal(read_all(source).x, X)


def test_source_tells_what_it_holds(shards):
    source = ArrayRecordSource(shards, labels=7)
    assert (len(source), source.row_shape, source.dtype, source.labels) == (9, (2, 3), np.float32, 7)
    assert source.name == f"{shards[0]} and 2 more"


def test_other_byte_orders_become_native(tmp_path):
    source = ArrayRecordSource(written(tmp_path / "rows", [npy(x.astype(">f4")) for x in X]))
    assert source.dtype.isnative
    np.testing.assert_array_equal(read_all(source).x, X)


def test_columns_first_come_out_in_c_order(tmp_path):
    source = ArrayRecordSource(written(tmp_path / "rows", [npy(np.asfortranarray(x)) for x in X]))
    np.testing.assert_array_equal(read_all(source).x, X)


def test_decode_may_be_given(tmp_path):
    def decode(record):
        return np.frombuffer(record[1:], np.uint8), record[0]

    source = ArrayRecordSource(written(tmp_path / "rows", [b"\1ab", b"\2cd"]), decode=decode, labels=3)
    rows = read_all(source)
    assert rows.x.tolist() == [[97, 98], [99, 100]] and rows.label.tolist() == [1, 2]


def test_threads_share_a_source(shards):
    source = ArrayRecordSource(shards, labels=4)
    orders = [np.random.default_rng(seed).permutation(9) for seed in range(100)]
    with ThreadPoolExecutor(4) as threads:
        for order, got in zip(orders, threads.map(source.take, orders), strict=True):
            np.testing.assert_array_equal(got.x, X[order])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        ArrayRecordSource(tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")


def test_missing_package_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(MissingDependency, match="array_record is not installed: pip install array_record"):
        ArrayRecordSource(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1 << 16), bytes(range(256)) * 512])
def test_file_of_another_format_is_refused(content, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows: must be a whole ArrayRecord file, got: \w"):
        ArrayRecordSource(path)


def test_file_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows: must "):
        ArrayRecordSource(written(tmp_path / "rows", []))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (npz(x=X[0].astype(float), label=1), r"record 9 must hold float32 of shape \(2, 3\) as .*, got float64"),
        (npz(x=X[0, :1], label=1), r"record 9 must hold float32 of shape \(2, 3\) as the first .* shape \(1, 3\)"),
        (npy(X[0]), "record 9 must have a label as the first record has, got None"),
        (npz(x=X[0], label=4), r"record 9: label must lie in \[0, 3\], got 4"),
        (npz(x=X[0], label=-1), r"record 9: label must lie in \[0, 3\], got -1"),
        (npz(x=X[0], label=1.0), r"record 9: label must be a single integer, got float64 of shape \(\)"),
        (npz(x=X[0], label=[1]), r"record 9: label must be a single integer, got int64 of shape \(1,\)"),
        (npz(x=X[0]), "record 9: must hold x and label, got x.npy"),
        (npz(x=X[0], label=1, more=2), "record 9: must hold x and label, got label.npy, more.npy, x.npy"),
        (npz(x=np.array([{}]), label=1), "record 9: x: must hold integers or floating point, got object"),
        (npz(x=np.array(["a"]), label=1), "record 9: x: must hold integers or floating point, got <U1"),
        (npy(X[0])[:-1], r"record 9: x: must hold 152 bytes for shape \(2, 3\) of float32, got 151"),
        (npy(X[0]) + b"x", "record 9: x: must hold 152 bytes for .*, got 153"),
        (LABELLED[0][:-30], "record 9: "),
        (pickle.dumps(X[0]), "record 9: "),
        (b"", "record 9: "),
    ],
)
def test_record_unlike_the_first_is_refused_by_number(record, message, tmp_path):
    source = ArrayRecordSource(written(tmp_path / "rows", [*LABELLED, record]), labels=4)
    with pytest.raises(ValueError, match=f"rows: {message}"):
        source.take(np.array([9]))


@pytest.mark.parametrize(
    "record", [LABELLED[0][:-30], b"PK", LABELLED[0].replace(X[0].tobytes(), bytes(24))], ids=["cut", "short", "sum"]
)
def test_damaged_archive_is_no_value_of_decode_npy(record):
    with pytest.raises(ValueError, match=r"must be a whole .npz archive, got: "):
        decode_npy(record)


def zipped(method, told=None):
    """An archive of 16 MiB of zeros that tells another length."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("label.npy", npy(1))
        archive.writestr("x.npy", bytes(1 << 24))
        length = archive.getinfo("x.npy").file_size.to_bytes(4, "little")
    return stream.getvalue().replace(length, length if told is None else told.to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (zipped(zipfile.ZIP_DEFLATED, told=99), "must be a whole .npz archive, got: Bad CRC-32"),
        (zipped(zipfile.ZIP_BZIP2, told=99), "must be stored or deflated, got label.npy packed by method 12"),
    ],
)
def test_archive_that_swells_beyond_what_it_tells_is_refused(record, message):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            decode_npy(record)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_device_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "rows").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="rows: must be an ordinary file, got a pipe, a device or the like"):
        ArrayRecordSource(tmp_path / "rows")


def test_file_of_a_bad_record_is_named(tmp_path, shards):
    source = ArrayRecordSource([*shards, written(tmp_path / "last", [LABELLED[0], PLAIN[0]])], labels=4)
    with pytest.raises(ValueError, match="last: record 1 must have a label"):
        source.take(np.array([10]))


def test_labels_that_no_one_counted_are_refused(shards):
    with pytest.raises(ValueError, match=r"labels must be given if and only if .*, got None and a label"):
        ArrayRecordSource(shards)


def test_number_of_labels_without_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels must be given if and only if records have labels, got 4 and no label"):
        ArrayRecordSource(written(tmp_path / "rows", PLAIN), labels=4)


def test_label_of_the_first_record_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"rows: record 0: label must lie in \[0, 0\], got 2"):
        ArrayRecordSource(written(tmp_path / "rows", [npz(x=X[0], label=2)]), labels=1)


def test_flipped_byte_of_a_record_is_refused(tmp_path):
    path = written(tmp_path / "rows", PLAIN, "group_size:1,uncompressed")
    content = path.read_bytes()
    path.write_bytes(flipped(content, (content.index(X[5].tobytes()) + 3, 8)))
    source = ArrayRecordSource(path)
    with pytest.raises(ValueError, match=r"rows: record 5 must be whole, got: .*hash mismatch"):
        source.take(np.array([5]))


@QUICK
@given(data=st.data())
def test_flipped_byte_gives_the_same_rows_or_is_refused(data, folder):
    content = written(folder / "whole", PLAIN).read_bytes()
    used = [position for position, value in enumerate(content) if value]
    position = data.draw(st.sampled_from(used))
    (folder / "flipped").write_bytes(flipped(content, (position, data.draw(st.integers(1, 255)))))
    if opens_or_is_refused(lambda: ArrayRecordSource(folder / "flipped")):
        np.testing.assert_array_equal(read_all(ArrayRecordSource(folder / "flipped")).x, X)


@QUICK
@given(flip=flips(len(LABELLED[0])))
def test_flipped_byte_within_a_record_gives_arrays_or_is_refused(flip, folder):
    def decode(record):
        return decode_npy(flipped(record, flip))

    path = written(folder / "one", LABELLED[:1])
    opens_or_is_refused(lambda: ArrayRecordSource(path, decode=decode, labels=4))


@pytest.mark.parametrize("label", [1.5, True, np.float32(1)])
def test_label_that_is_no_integer_is_refused(unchecked, label, tmp_path):
    path = written(tmp_path / "rows", PLAIN)
    with pytest.raises(ValueError, match="record 0: label must be an integer, got "):
        ArrayRecordSource(path, decode=lambda record: (X[0], label), labels=4)


def test_more_labels_than_int32_has_are_refused(tmp_path):
    path = written(tmp_path / "rows", [npz(x=X[0], label=2**32)])
    with pytest.raises(ValueError, match=r"labels must be at most 2147483648, .* got 8589934592"):
        ArrayRecordSource(path, labels=2**33)
