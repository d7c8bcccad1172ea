"""Arrays in .npy files are read row by row as NumPy wrote them; a file that is not what its header says is refused."""

import itertools
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from damage import flipped, flips, given, opens_or_is_refused, QUICK, read_all, st

from mf_eqx.data._npy import NpySource

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(11, 2, 3)).astype(np.float32)
LABEL = RANDOM.integers(0, 4, 11)
CUTS = [0, 5, 6, 11]


def saved(folder, name, value):
    path = folder / name
    np.save(path, value)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("npy")


@pytest.fixture(scope="module")
def shards(folder):
    parts = list(itertools.pairwise(CUTS))
    return (
        [saved(folder, f"x_{a}.npy", X[a:b]) for a, b in parts],
        [saved(folder, f"label_{a}.npy", LABEL[a:b]) for a, b in parts],
    )


@pytest.fixture(scope="module")
def content(folder):
    return saved(folder, "content.npy", X).read_bytes()


def test_one_file_gives_its_rows(folder):
    path = saved(folder, "one.npy", X)
    np.testing.assert_array_equal(read_all(NpySource(path)).x, X)


def test_path_may_be_text(folder):
    np.testing.assert_array_equal(NpySource(str(saved(folder, "text.npy", X))).take(np.array([4])).x, X[4:5])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i1", "i4", "?", ">f4", ">i2"])
def test_values_of_every_dtype_are_kept_in_native_order(dtype, folder):
    x = (10 * X).astype(dtype)
    source = NpySource(saved(folder, "dtype.npy", x))
    assert source.dtype == x.dtype.newbyteorder("=") and source.dtype.isnative
    np.testing.assert_array_equal(read_all(source).x, x)


@QUICK
@given(rows=st.lists(st.integers(0, 10), min_size=0, max_size=20))
def test_shards_are_gathered_as_one_array(rows, shards):
    rows = np.array(rows, int)
    got = NpySource(*shards).take(rows)
    np.testing.assert_array_equal(got.x, X[rows])
    np.testing.assert_array_equal(got.label, LABEL[rows])


def test_source_tells_what_it_holds(shards):
    source = NpySource(*shards, labels=7)
    assert (len(source), source.row_shape, source.dtype, source.labels) == (11, (2, 3), np.float32, 7)
    assert source.name == f"{shards[0][0]} and 2 more"


def test_number_of_labels_is_the_largest_of_all_shards_and_one_more(shards):
    assert NpySource(*shards).labels == LABEL.max() + 1


def test_rows_are_a_copy(shards):
    source = NpySource(*shards)
    source.take(np.array([0])).x[:] = 7
    np.testing.assert_array_equal(source.take(np.array([0])).x, X[:1])


def test_threads_share_a_source(shards):
    source = NpySource(*shards)
    orders = [np.random.default_rng(seed).permutation(11) for seed in range(200)]
    with ThreadPoolExecutor(4) as threads:
        for order, got in zip(orders, threads.map(source.take, orders), strict=True):
            np.testing.assert_array_equal(got.x, X[order])


def test_headers_of_version_2_are_read(folder):
    path = folder / "version.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array(file, X, version=(2, 0))
    np.testing.assert_array_equal(read_all(NpySource(path)).x, X)


def test_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError) as missing:
        NpySource(folder / "none.npy")
    assert missing.value.filename == str(folder / "none.npy")


def test_no_file_is_refused():
    with pytest.raises(ValueError, match="x must be at least one path, got none"):
        NpySource([])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}, {}]), "bad.npy: must hold integers or floating point, got object"),
        (np.array(["a", "b"]), "bad.npy: must hold integers or floating point, got <U1"),
        (np.zeros(3, [("a", "f4")]), "bad.npy: must hold integers or floating point, got "),
        (np.zeros(8)[[]], r"bad.npy: must have at least one row and no empty axis, got shape \(0,\)"),
        (X.astype(complex), "bad.npy: must hold integers or floating point, got complex128"),
        (np.asfortranarray(X), "bad.npy: must hold one row after the other .C order., got Fortran order"),
        (X[:0], r"bad.npy: must have at least one row and no empty axis, got shape \(0, 2, 3\)"),
        (X[:, :0], r"bad.npy: must have at least one row and no empty axis, got shape \(11, 0, 3\)"),
        (np.float32(3), r"bad.npy: must have at least one row and no empty axis, got shape \(\)"),
    ],
)
def test_arrays_that_are_no_rows_are_refused(value, message, folder):
    with pytest.raises(ValueError, match=message):
        NpySource(saved(folder, "bad.npy", value))


@pytest.mark.parametrize("change", [-1, -100, 1, 4096])
def test_file_of_another_length_is_refused_with_numbers(change, content, folder):
    path = folder / "length.npy"
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    size = len(content)
    message = rf"length.npy: must hold {size} bytes for shape \(11, 2, 3\) of float32, got {size + change:,}$"
    with pytest.raises(ValueError, match=message):
        NpySource(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"hello",
        b"\x93NUMPY\x03\x00" + struct.pack("<I", 2**31) + b"{",
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{",
        b"\x93NUMPY\x01\x00\xff\xff{'shape': (",
    ],
)
def test_file_of_another_format_is_refused(text, folder):
    path = folder / "format.npy"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"format.npy: must be an array in .npy format, got an unreadable header"):
        NpySource(path)


def with_shape(text):
    """A file of 8 bytes behind a header with any text as the shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {text}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(True, 2)", r"shape must be integers in \[0, 9223372036854775807\], got True"),
        ("(2, -1)", r"shape must be integers in \[0, 9223372036854775807\], got -1"),
        (f"(0x1{'0' * 5000},)", r"shape must be integers in \[0, 9223372036854775807\], got one of 20001 bits"),
        (f"(1{'0' * 3000}, 1{'0' * 3000})", r"shape must be integers in .*, got one of 9966 bits"),
        (f"({'1, ' * 100})", "must have at most 32 axes, got 100"),
        (f"(2, {'1, ' * 32})", "must have at most 32 axes, got 33"),
    ],
    ids=range(6),
)
def test_senseless_shape_is_refused(shape, message, folder):
    path = folder / "shape.npy"
    path.write_bytes(with_shape(shape))
    with pytest.raises(ValueError, match=f"shape.npy: {message}$"):
        NpySource(path)


def test_32_axes_are_read(folder):
    path = folder / "axes.npy"
    path.write_bytes(with_shape(f"(2, {'1, ' * 31})"))
    assert NpySource(path).row_shape == (1,) * 31


def test_device_in_place_of_a_file_is_refused(folder):
    (folder / "device.npy").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"device.npy: must be an ordinary file, got a pipe, a device or the like"):
        NpySource(folder / "device.npy")


def test_link_to_a_file_is_followed(folder):
    (folder / "link.npy").symlink_to(saved(folder, "linked.npy", X))
    np.testing.assert_array_equal(read_all(NpySource(folder / "link.npy")).x, X)


def test_shard_of_another_shape_is_refused(folder, shards):
    path = saved(folder, "shape.npy", X[:, :1])
    with pytest.raises(ValueError, match=r"shape.npy: must have rows of shape \(2, 3\) as .*x_0.npy has, got \(1, 3\)"):
        NpySource([*shards[0], path])


def test_shard_of_another_dtype_is_refused(folder, shards):
    path = saved(folder, "double.npy", X.astype(float))
    with pytest.raises(ValueError, match=r"double.npy: must be float32 as .*x_0.npy is, got float64"):
        NpySource([*shards[0], path])


@pytest.mark.parametrize(
    ("label", "labels", "message"),
    [
        (LABEL[:10], None, r"labels.npy: must have shape \(11,\) for the rows of .*rows.npy, got \(10,\)"),
        (LABEL[:, None], None, r"labels.npy: must have shape \(11,\) for the rows of .*rows.npy, got \(11, 1\)"),
        (LABEL.astype(float), None, "labels.npy: label must be an integer, got float64"),
        (np.full(11, 4), 4, r"labels.npy: label must lie in \[0, 3\], got 4 in row 0"),
        (-LABEL, None, r"labels.npy: label must lie in \[0, 2147483647\], got -"),
        (LABEL + 2**32, None, r"labels.npy: label must lie in \[0, 2147483647\], got 42949672\d\d in row 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(label, labels, message, folder):
    x, label = saved(folder, "rows.npy", X), saved(folder, "labels.npy", label)
    with pytest.raises(ValueError, match=message):
        NpySource(x, label, labels=labels)


def test_fewer_label_files_than_shards_are_refused(shards):
    with pytest.raises(ValueError, match="label must be 3 files, one for each of x, got 2"):
        NpySource(shards[0], shards[1][:2])


def test_number_of_labels_without_labels_is_refused(shards):
    with pytest.raises(ValueError, match="label must be given with labels = 3, got None"):
        NpySource(shards[0], labels=3)


@QUICK
@given(data=st.data())
def test_flipped_byte_gives_rows_or_is_refused(data, content, folder):
    path = folder / "flipped.npy"
    path.write_bytes(flipped(content, data.draw(flips(len(content)))))
    opens_or_is_refused(lambda: NpySource(path))


@QUICK
@given(data=st.data())
def test_flipped_header_gives_rows_or_is_refused(data, content, folder):
    path = folder / "flipped.npy"
    path.write_bytes(flipped(content, data.draw(flips(128))))
    opens_or_is_refused(lambda: NpySource(path))


@QUICK
@given(length=st.integers(0, 300))
def test_truncated_file_is_refused(length, content, folder):
    path = folder / "truncated.npy"
    path.write_bytes(content[: min(length, len(content) - 1)])
    assert not opens_or_is_refused(lambda: NpySource(path))
