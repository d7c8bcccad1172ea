"""IDX files are read as MNIST's description says, gzipped or not; damaged ones are refused."""

import functools
import gzip
import os
import struct

import numpy as np
import pytest
from damage import flipped, flips, given, opens_or_is_refused, QUICK, read_all, st

from mf_eqx.data._idx import read_idx

RANDOM = np.random.default_rng(1)
IMAGES = RANDOM.integers(0, 256, (7, 5, 4), np.uint8)
LABEL = RANDOM.integers(0, 10, 7).astype(np.uint8)
packed = functools.partial(gzip.compress, mtime=0)
CODES = {"B": 8, "b": 9, "h": 11, "i": 12, "f": 13, "d": 14}


def idx(value, code="B"):
    """The format, written value by value."""
    header = bytes([0, 0, CODES[code], value.ndim]) + b"".join(struct.pack(">i", size) for size in value.shape)
    return header + b"".join(struct.pack(">" + code, number) for number in value.ravel().tolist())


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("idx") / "images"


def test_images_get_a_channel_axis(write):
    source = read_idx(write("images", idx(IMAGES)), write("labels", idx(LABEL)), labels=10)
    rows = read_all(source)
    assert (source.row_shape, source.labels) == ((1, 5, 4), 10)
    np.testing.assert_array_equal(rows.x[:, 0], IMAGES)
    np.testing.assert_array_equal(rows.label, LABEL)


def test_gzip_is_seen_by_content_whatever_the_name(write):
    source = read_idx(write("images.txt", packed(idx(IMAGES))))
    np.testing.assert_array_equal(read_all(source).x[:, 0], IMAGES)


@pytest.mark.parametrize("code", CODES)
def test_every_dtype_is_read_in_native_order(code, write):
    value = IMAGES.astype(np.int16) - 128 if code != "B" else IMAGES
    source = read_idx(write("images", idx(value, code)))
    assert source.dtype == np.dtype(code) and source.dtype.isnative
    np.testing.assert_array_equal(read_all(source).x[:, 0], value)


@pytest.mark.parametrize("shape", [(4, 35), (2, 2, 5, 7)])
def test_rows_of_other_shapes_stay_as_they_are(shape, write):
    value = IMAGES.reshape(shape)
    np.testing.assert_array_equal(read_all(read_idx(write("images", idx(value)))).x, value)


def test_number_of_labels_is_the_largest_and_one_more(write):
    assert read_idx(write("images", idx(IMAGES)), write("labels", idx(LABEL))).labels == LABEL.max() + 1


def test_names_of_classes_give_the_number_of_labels(write):
    source = read_idx(write("images", idx(IMAGES)), write("labels", idx(LABEL)), class_names=[*"abcdefghijkl"])
    assert (source.labels, source.class_names) == (12, (*"abcdefghijkl",))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        read_idx(tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")


WHOLE = idx(IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "images: must start with 0, 0, a dtype and a number of axes"),
        (b"PNG and so on", "images: must start with 0, 0, a dtype and a number of axes"),
        (b"\0\0\x07" + WHOLE[3:], "images: must start with 0, 0, a dtype and a number of axes"),
        (b"\0\0\x08\xff" + WHOLE[4:], "images: must start with 0, 0, a dtype and a number of axes"),
        (WHOLE[:9], "images: must hold 16 bytes of header, got 9"),
        (WHOLE[:-1], r"images: must hold 140 bytes for shape \(7, 5, 4\) of uint8, got 139$"),
        (WHOLE + b"\0", r"images: must hold 140 bytes for shape \(7, 5, 4\) of uint8, got more$"),
        (packed(WHOLE[:-1]), r"images: must hold 140 bytes for shape \(7, 5, 4\) of uint8, got 139$"),
        (packed(WHOLE + bytes(1 << 24)), r"images: must hold 140 bytes .* got more$"),
        (packed(WHOLE)[:-9], "images: must be a whole gzip file, got: "),
        (packed(WHOLE)[:-8] + bytes(8), "images: must be a whole gzip file, got: CRC"),
        (idx(IMAGES[:0]), r"images: must have at least one row and no empty axis, got shape \(0, 5, 4\)"),
        (idx(LABEL), r"images: must have a row axis and others, got shape \(7,\)"),
        (b"\0\0\x08\3" + b"\xff" * 12 + bytes(99), "images: must hold 79,228,162,458,924,105,385,300,197,375 bytes"),
        pytest.param(
            packed(b"\0\0\x08\3" + b"\xff" * 12 + bytes(99)), "images: must hold 79,228,162,458,924", id="bomb"
        ),
    ],
)
def test_bad_files_are_refused(content, message, write):
    with pytest.raises(ValueError, match=message):
        read_idx(write("images", content))


def test_device_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "images").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="images: must be an ordinary file, got a pipe, a device or the like"):
        read_idx(tmp_path / "images")


def test_more_bytes_than_are_allowed_are_refused_with_numbers(write):
    images, label = write("images", WHOLE), write("labels", idx(LABEL))
    assert len(read_idx(images, label, most_bytes=140)) == 7
    with pytest.raises(
        ValueError, match=r"images: must hold at most 139 bytes, which is most_bytes, got 140 for shape"
    ):
        read_idx(images, label, most_bytes=139)
    with pytest.raises(ValueError, match=r"labels: must hold at most 300,000 bytes, .* got 300,001 for shape"):
        read_idx(images, write("labels", b"\0\0\x08\1" + struct.pack(">i", 300_001) + bytes(400)), most_bytes=300_000)


def test_more_than_8_gib_are_refused_by_default(write):
    path = write("images", b"\0\0\x08\2" + struct.pack(">ii", 1 << 17, (1 << 16) + 1))
    os.truncate(path, 9_000_000)  # could unpack to so much, as far as its length tells
    with pytest.raises(ValueError, match=r"images: must hold at most 8,589,934,592 bytes, .* got 8,590,065,664 for"):
        read_idx(path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (idx(LABEL[:5]), r"labels: label must have one value for each of the 7 rows, got shape \(5,\)"),
        (idx(IMAGES), r"labels: label must have one value for each of the 7 rows, got shape \(7, 5, 4\)"),
        (idx(LABEL, "f"), "labels: label must be an integer, got float32"),
        (idx(np.full(7, 10)), r"labels: label must lie in \[0, 9\], got 10 in row 0"),
        (idx(np.full(7, -1), "i"), r"labels: label must lie in \[0, 9\], got -1 in row 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(label, message, write):
    with pytest.raises(ValueError, match=message):
        read_idx(write("images", WHOLE), write("labels", label), labels=10)


@pytest.mark.parametrize("content", [WHOLE, packed(WHOLE)], ids=["plain", "gzip"])
@QUICK
@given(data=st.data())
def test_flipped_byte_gives_rows_or_is_refused(data, content, path):
    path.write_bytes(flipped(content, data.draw(flips(len(content)))))
    opens_or_is_refused(lambda: read_idx(path))


@QUICK
@given(flip=flips(16).filter(lambda flip: flip != (2, 1)))  # which makes bytes with a sign, of the same length
def test_flipped_header_is_refused(flip, path):
    path.write_bytes(flipped(WHOLE, flip))
    assert not opens_or_is_refused(lambda: read_idx(path))


@pytest.mark.parametrize("content", [WHOLE, packed(WHOLE)], ids=["plain", "gzip"])
@QUICK
@given(data=st.data())
def test_truncated_file_is_refused(data, content, path):
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert not opens_or_is_refused(lambda: read_idx(path))


@pytest.mark.parametrize("most_bytes", [1.5, True])
def test_number_of_bytes_that_is_no_integer_is_refused(unchecked, most_bytes, write):
    with pytest.raises(ValueError, match=f"most_bytes must be an integer >= 1, got {most_bytes}"):
        read_idx(write("images", WHOLE), most_bytes=most_bytes)
