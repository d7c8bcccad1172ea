"""CIFAR-10 is read alike in all its forms; nothing in its files can run, leave the archive or fill memory."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
from damage import example, flipped, flips, given, opens_or_is_refused, QUICK, read_all, st

from mf_eqx import _plain_pickle
from mf_eqx.data import _cifar10
from mf_eqx.data._byte_arrays import read_plain_pickle
from mf_eqx.data._cifar10 import read_cifar10

RANDOM = np.random.default_rng(2)
ROWS = 3
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
X = {name: RANDOM.integers(0, 256, (ROWS, 3, 32, 32), np.uint8) for name in NAMES}
LABEL = {name: RANDOM.integers(0, 10, ROWS).tolist() for name in NAMES}


def binary(x, label):
    return b"".join(bytes([number]) + image.tobytes() for image, number in zip(x, label, strict=True))


def text(value):
    """What Python 2 writes for a string, in which each character is a byte."""
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value


def python_2(x, label):
    """Byte by byte what Python 2 wrote into CIFAR-10's files, with protocol 2 and the module names of that time."""
    put = iter(range(256))

    def memo():
        return b"q" + bytes([next(put)])

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + memo() + b"cnumpy\nndarray\n" + memo()
    array += b"K\0\x85" + memo() + text(b"b") + b"\x87" + memo() + b"R" + memo()
    array += b"(K\x01M" + struct.pack("<H", len(x)) + b"M" + struct.pack("<H", 3072) + b"\x86" + memo()
    array += b"cnumpy\ndtype\n" + memo() + text(b"u1") + b"K\0K\x01\x87" + memo() + b"R" + memo()
    array += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t" + memo() + b"b"
    array += b"\x89" + text(x.tobytes()) + b"t" + memo() + b"b"
    labels = b"]" + memo() + b"(" + b"".join(b"K" + bytes([number]) for number in label) + b"e"
    files = b"]" + memo() + b"(" + b"".join(text(b"a_%d.png" % row) + memo() for row in range(len(x))) + b"e"
    content = [text(b"batch_label"), memo(), text(b"training batch 1 of 5"), memo()]
    content += [text(b"labels"), memo(), labels, text(b"data"), memo(), array, text(b"filenames"), memo(), files]
    return b"\x80\x02}" + memo() + b"(" + b"".join(content) + b"u."


def python_3(protocol, *, keys=str):
    """What a program of today writes that read the files and writes them again."""

    def write(x, label):
        values = {"batch_label": "b", "labels": label, "data": x.reshape(-1, 3072), "filenames": ["a"] * len(x)}
        return pickle.dumps({keys(key): value for key, value in values.items()}, protocol)

    return write


FORMS = {
    "binary": (".bin", binary),
    "python 2": ("", python_2),
    "protocol 2": ("", python_3(2)),
    "protocol 4": ("", python_3(4)),
    "protocol 5": ("", python_3(5)),
    "keys of bytes": ("", python_3(4, keys=str.encode)),
}


def files(form="binary", **changed):
    suffix, write = FORMS[form]
    return {name + suffix: changed.get(name, write(X[name], LABEL[name])) for name in NAMES}


def in_folder(root, contents):
    root.mkdir(exist_ok=True)
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return root


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


def tar(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, content)
    return stream.getvalue()


def archive_of(contents, folder="cifar-10-batches-bin/"):
    return tar([member(folder + name, content) for name, content in contents.items()])


def packed(content):
    return gzip.compress(content, 1, mtime=0)


def check(source, names):
    rows = read_all(source)
    assert (source.row_shape, source.dtype, source.labels) == ((3, 32, 32), np.uint8, 10)
    assert source.class_names[0] == "airplane" and source.class_names[9] == "truck"
    np.testing.assert_array_equal(rows.x, np.concatenate([X[name] for name in names]))
    np.testing.assert_array_equal(rows.label, np.concatenate([LABEL[name] for name in names]))


@pytest.mark.parametrize("form", FORMS)
def test_folder_is_read_in_every_form(form, tmp_path):
    root = in_folder(tmp_path / "cifar", files(form))
    check(read_cifar10(root), NAMES[:5])
    check(read_cifar10(root, train=False), NAMES[5:])


@pytest.mark.parametrize("form", ["binary", "python 2"])
@pytest.mark.parametrize("pack", [packed, bytes], ids=["gzip", "plain"])
def test_archive_is_read_in_both_versions(form, pack, tmp_path):
    path = tmp_path / "cifar"
    path.write_bytes(pack(archive_of(files(form))))
    check(read_cifar10(path), NAMES[:5])


def test_order_within_an_archive_does_not_matter(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(packed(archive_of(dict(reversed(files().items())))))
    check(read_cifar10(path), NAMES[:5])


def test_reading_an_archive_leaves_nothing_on_disk(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(packed(archive_of(files())))
    read_cifar10(path)
    assert os.listdir(tmp_path) == ["cifar.tar.gz"]


def test_first_pixel_is_the_red_of_the_upper_left_corner(tmp_path):
    image = np.zeros((1, 3, 32, 32), np.uint8)
    image[0, :, 0, 0], image[0, 0, 0, 1] = (10, 20, 30), 40
    record = bytes([7]) + bytes([10, 40, *bytes(1022), 20, *bytes(1023), 30, *bytes(1023)])
    source = read_cifar10(in_folder(tmp_path, {"test_batch.bin": record}), train=False)
    np.testing.assert_array_equal(read_all(source).x, image)


# Refusals of folders


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        read_cifar10(tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")


def test_missing_batches_are_named(tmp_path):
    contents = files()
    del contents["data_batch_2.bin"], contents["data_batch_4.bin"]
    message = r"data_batch_1.bin to data_batch_5.bin of CIFAR-10, got no data_batch_2.bin, data_batch_4.bin"
    with pytest.raises(ValueError, match=message):
        read_cifar10(in_folder(tmp_path, contents))


def test_folder_without_batches_is_told_what_was_expected(tmp_path):
    message = "must hold data_batch_1.bin to data_batch_5.bin or data_batch_1 to data_batch_5 of CIFAR-10, got none"
    with pytest.raises(ValueError, match=message):
        read_cifar10(in_folder(tmp_path, {"train.bin": b"CIFAR-100"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data_batch_3.bin: must hold a whole number of records of 3,073 bytes, got 0 bytes"),
        (bytes(3072), "data_batch_3.bin: must hold a whole number of records of 3,073 bytes, got 3,072 bytes"),
        (bytes(3074 * 2), "data_batch_3.bin: must hold a whole number of records of 3,073 bytes, got 6,148 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), r"data_batch_3.bin: label must lie in \[0, 9\], got 10 in row 1"),
    ],
)
def test_bad_binary_files_are_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_cifar10(in_folder(tmp_path, files(data_batch_3=content)))


def test_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_cifar10, "_LARGEST_FILE", 5000)
    with pytest.raises(ValueError, match=r"data_batch_1.bin: must hold at most 5,000 bytes, got 9,219"):
        read_cifar10(in_folder(tmp_path, files()))


@pytest.mark.parametrize("name", ["test_batch", "test_batch.bin"])
def test_device_in_place_of_a_file_is_refused(name, tmp_path):
    (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(ValueError, match=f"{name}: must be an ordinary file, got a pipe, a device or the like"):
        read_cifar10(tmp_path, train=False)


def test_device_in_place_of_an_archive_is_refused(tmp_path):
    (tmp_path / "cifar.tar").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"cifar.tar: must be an ordinary file, got a pipe, a device or the like"):
        read_cifar10(tmp_path / "cifar.tar")


def test_archive_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_cifar10, "_LARGEST_ARCHIVE", 5000)
    (tmp_path / "cifar.tar").write_bytes(archive_of(files()))
    with pytest.raises(ValueError, match=r"cifar.tar: must hold at most 5,000 bytes, got \d+,\d+"):
        read_cifar10(tmp_path / "cifar.tar")


# Refusals of pickles


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


GOOD = {"data": X["test_batch"].reshape(-1, 3072), "labels": LABEL["test_batch"]}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "(__builtin__|builtins).eval"), (np.load, "numpy.load")],
)
def test_pickled_call_is_refused_by_name_and_does_not_run(function, name, protocol, tmp_path):
    trace = tmp_path / "trace"
    argument = f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w')"
    content = pickle.dumps(GOOD | {"filenames": Calls(function, argument)}, protocol)
    with pytest.raises(ValueError, match=f"test_batch: .* names {name}, which is no part of CIFAR-10"):
        read_cifar10(in_folder(tmp_path / "cifar", {"test_batch": content}), train=False)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "test_batch: must be a pickled dictionary of CIFAR-10, got list"),
        ({}, r"test_batch: data must be an array of shape \(rows, 3072\), got NoneType"),
        (GOOD | {"data": np.zeros((3, 3072), np.float32)}, "test_batch: must hold arrays of uint8, got dtype 'f4'"),
        (GOOD | {"data": np.array([{}])}, "test_batch: must hold arrays of uint8, got dtype 'O8'"),
        (GOOD | {"data": np.zeros((3, 3073), np.uint8)}, r"shape \(rows, 3072\), got shape \(3, 3073\)"),
        (GOOD | {"data": np.zeros((0, 3072), np.uint8)}, r"shape \(rows, 3072\), got shape \(0, 3072\)"),
        (GOOD | {"data": np.zeros((3072, 3), np.uint8).T}, "must hold arrays of uint8 in C order"),
        (GOOD | {"labels": [0, 1]}, "test_batch: labels must be a list of 3 numbers, got 2"),
        (GOOD | {"labels": "012"}, "test_batch: labels must be a list of 3 numbers, got str"),
        (GOOD | {"labels": [0, 10, 1]}, r"test_batch: label must be an integer in \[0, 9\], got 10 in row 1"),
        (GOOD | {"labels": [0, 1, -1]}, r"test_batch: label must be an integer in \[0, 9\], got -1 in row 2"),
        (GOOD | {"labels": [0, 1, True]}, r"test_batch: label must be an integer in \[0, 9\], got bool in row 2"),
        (GOOD | {"labels": [0, 1, [[]]]}, r"test_batch: label must be an integer in \[0, 9\], got list in row 2"),
        (GOOD | {"more": 1.5}, "got the instruction BINFLOAT, which is no part of CIFAR-10"),
        (GOOD | {"more": {3}}, "got the instruction EMPTY_SET, which is no part of CIFAR-10"),
        ({(1, 2): 3}, "test_batch: must be a whole pickle of CIFAR-10, got damaged instructions"),
    ],
)
def test_pickles_of_something_else_are_refused(values, message, tmp_path):
    content = pickle.dumps(values, 4)
    with pytest.raises(ValueError, match=message):
        read_cifar10(in_folder(tmp_path, {"test_batch": content}), train=False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02e.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01K\x01R.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}T\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        b"\x80\x02}" + b"]\x85" + b"\x85" * 150_000 + b"K\x01s.",
        b"\x80\x02}(" + 2 * (b")" + b"\x85" * 9_990 + b"K\x01") + b"u.",
        b"\x80\x05}\x96" + b"\xff" * 7 + b"\0.",
        b"\x80\x02c_codecs\nencode\nN}X\4\0\0\0nameK\1s\x86b.",
        b"\x80\x02cnumpy\ndtype\n}X\4\0\0\0nameK\1sb.",
        b"\x80\x02cnumpy\ndtype\n" + b"]" + b"\x85" * 19_999 + b"R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)Rq\0(K\3h\0h\0h\0h\0tb.",
    ],
    ids=range(18),
)
def test_senseless_pickles_are_refused(content):
    with pytest.raises(ValueError, match="file: "):
        read_plain_pickle("file", content, "CIFAR-10")


FRAME = b"\x80\x04\x95\3\0\0\0\0\0\0\0J\0\0"  # ends within the number of J


@pytest.mark.parametrize("hidden", [b"}X\1\0\0\0a\x8fs.", b"}r\0\0\0\x10."], ids=["set", "memo"])
def test_instructions_hidden_behind_the_end_of_a_frame_are_not_run(hidden):
    content = FRAME + b"\0\0C" + bytes([len(hidden)]) + hidden + b"}."
    with pytest.raises(ValueError, match="file: must be a whole pickle of CIFAR-10, got damaged instructions"):
        read_plain_pickle("file", content, "CIFAR-10")


def test_key_of_tuples_that_share_their_parts_is_refused_before_it_is_hashed():
    doubled = b"".join(b"h" + bytes([i, 0x68, i]) + b"\x86q" + bytes([i + 1]) for i in range(200))
    with pytest.raises(ValueError, match="keys must be text or integers below 2\\^32, got tuple"):
        read_plain_pickle("file", b"\x80\x02})q\0" + doubled + b"K\1s.", "CIFAR-10")


def test_a_value_of_a_large_number_takes_no_memory():
    tracemalloc.start()
    try:
        assert read_plain_pickle("file", b"\x80\x02}r\xff\xff\xff\x7f.", "CIFAR-10") == {}
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_functions_of_numpy_are_no_values():
    with pytest.raises(ValueError, match="file: must hold plain values alone, got a name"):
        read_plain_pickle("file", b"\x80\x02}U\1ac_codecs\nencode\ns.", "CIFAR-10")


def test_pickle_of_too_many_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(_plain_pickle, "_MOST_STEPS", 10)
    with pytest.raises(ValueError, match="file: must hold at most 10 instructions, got more"):
        read_plain_pickle("file", pickle.dumps(list(range(10)), 4), "CIFAR-10")


LONG = b"x" * 1_000_000
ENCODE = b"\x80\x02X" + struct.pack("<I", len(LONG)) + LONG + b"q\1c_codecs\nencode\nq\2X\6\0\0\0latin1q\3"
BYTES = b"\x80\x03}q\0B" + struct.pack("<I", len(LONG)) + LONG + b"q\1"
STATE = b"cnumpy\ndtype\nU\2u1\x85Rq\2J" + struct.pack("<I", len(LONG)) + b"\x85q\3"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\1h\3h\2\x89h\1tb"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(ENCODE + b"h\2h\1h\3\x86R" * 60 + b".", id="encoded"),
        pytest.param(b"\x80\x02T" + BYTES[6:] + STATE + ARRAY * 60 + b".", id="arrays"),
        pytest.param(BYTES[:5] + b"X" + BYTES[6:] + b"h\1h\1" * 60 + b"\x93.", id="names"),
    ],
)
def test_pickle_that_copies_a_long_text_again_and_again_is_refused(content):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"file: must (unpack|hold plain values)") as refused:
            read_plain_pickle("file", content, "CIFAR-10")
        assert tracemalloc.get_traced_memory()[1] < 8 * len(content)
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 300


def test_key_that_is_set_again_and_again_is_copied_once():
    content = BYTES + b"h\0(" + b"h\1K\0" * 60 + b"u."
    tracemalloc.start()
    try:
        assert read_plain_pickle("file", content, "CIFAR-10") == {LONG.decode(): 0}
        assert tracemalloc.get_traced_memory()[1] < 8 * len(content)
    finally:
        tracemalloc.stop()


def test_long_name_is_told_by_its_start():
    with pytest.raises(ValueError, match=r"file: .* names a\.x+, which is no part") as refused:
        read_plain_pickle("file", b"\x80\x02ca\n" + LONG + b"\n.", "CIFAR-10")
    assert len(str(refused.value)) < 300


def test_array_of_another_length_than_its_shape_is_refused(tmp_path):
    content = python_2(X["test_batch"], LABEL["test_batch"]).replace(b"M\x03\x00M", b"M\xff\xffM")
    with pytest.raises(
        ValueError, match=r"must hold 201,323,520 bytes for an array of shape \(65535, 3072\), got 9,216"
    ):
        read_cifar10(in_folder(tmp_path, {"test_batch": content}), train=False)


@pytest.mark.parametrize("form", FORMS)
@QUICK
@given(data=st.data())
def test_flipped_byte_gives_rows_or_is_refused(data, form, tmp_path_factory):
    suffix, write = FORMS[form]
    content = write(X["test_batch"][:1], LABEL["test_batch"][:1])
    near_the_ends = st.one_of(flips(400), flips(400).map(lambda flip: (len(content) - 1 - flip[0], flip[1])))
    changed = flipped(content, data.draw(near_the_ends))
    root = in_folder(tmp_path_factory.getbasetemp() / f"flipped{suffix}", {"test_batch" + suffix: changed})
    opens_or_is_refused(lambda: read_cifar10(root, train=False))


@QUICK
@given(data=st.data())
def test_truncated_pickle_is_refused(data, tmp_path_factory):
    content = python_2(X["test_batch"], LABEL["test_batch"])
    root = tmp_path_factory.getbasetemp() / "truncated"
    in_folder(root, {"test_batch": content[: data.draw(st.integers(0, len(content) - 1))]})
    assert not opens_or_is_refused(lambda: read_cifar10(root, train=False))


# Refusals of archives


TEST = binary(X["test_batch"], LABEL["test_batch"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("a/test_batch.bin", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "must be an ordinary file"),
        ([member("a/test_batch.bin", type=tarfile.LNKTYPE, linkname="a/other")], "must be an ordinary file"),
        ([member("a/test_batch.bin", type=tarfile.CHRTYPE)], "must be an ordinary file"),
        ([member("test_batch.bin", type=tarfile.DIRTYPE)], "must be an ordinary file"),
        ([member("../test_batch.bin", TEST)], r"must lie inside of the archive, got '../test_batch.bin'"),
        ([member("a/../../test_batch.bin", TEST)], r"must lie inside of the archive, got 'a/../../test_batch.bin'"),
        ([member("/tmp/test_batch.bin", TEST)], r"must lie inside of the archive, got '/tmp/test_batch.bin'"),
        ([member("a/test_batch.bin", TEST), member("b/test_batch.bin", TEST)], "must be there only once, got it again"),
        ([member(f"a/{number}") for number in range(1001)], "it must have at most 1,000 members, got more"),
        ([member("a/readme.html", b"hello")], "must hold test_batch.bin or test_batch of CIFAR-10, got none"),
    ],
)
def test_archive_with_other_members_is_refused(members, message, tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(packed(tar(members)))
    with pytest.raises(ValueError, match=f"cifar.tar.gz: .*{message}"):
        read_cifar10(path, train=False)


def test_links_of_other_names_are_left_alone(tmp_path):
    path = tmp_path / "cifar.tar"
    link = member("a/readme", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    path.write_bytes(tar([link, member("a/test_batch.bin", TEST)]))
    check(read_cifar10(path, train=False), NAMES[5:])


def test_archive_that_swells_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_cifar10, "_LARGEST_ARCHIVE", 1 << 20)
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(packed(tar([member("a/readme", bytes(1 << 19)) for _ in range(3)])))
    with pytest.raises(ValueError, match=r"cifar.tar.gz: must unpack to at most 1,048,576 bytes, got more"):
        read_cifar10(path)


@pytest.mark.parametrize("name", ["a/readme", "a/test_batch.bin"])
def test_member_that_announces_more_than_an_archive_holds_is_refused(name, tmp_path):
    path = tmp_path / "cifar.tar.gz"
    info, _ = member(name, size=1 << 60)
    path.write_bytes(packed(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    message = "its members must have 0 to 536,870,912 bytes, got 1,152,921,504,606,846,976"
    with pytest.raises(
        ValueError, match=f"cifar.tar.gz: must be a tar archive of CIFAR-10, gzipped or not, got: {message}"
    ):
        read_cifar10(path, train=False)


def test_member_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_cifar10, "_LARGEST_FILE", 5000)
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(packed(archive_of(files())))
    with pytest.raises(ValueError, match=r"cifar.tar.gz: data_batch_1.bin must hold at most 5,000 bytes, got 9,219"):
        read_cifar10(path)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(10240), packed(b"hello")])
def test_file_that_is_no_archive_is_refused(content, tmp_path):
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar.tar.gz: must "):
        read_cifar10(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["a/", "ä" * 40 + "/" + "b" * 90 + "/"], ids=["short", "long"])
def test_archive_in_every_format_is_read(format, folder, tmp_path):
    if format == tarfile.USTAR_FORMAT and len(folder) > 2:
        pytest.skip("such names do not fit")
    with tarfile.open(tmp_path / "cifar.tar", "w", format=format, encoding="utf-8") as archive:
        for info, content in [member(folder, type=tarfile.DIRTYPE), member(folder + "test_batch.bin", TEST, mtime=0.5)]:
            archive.addfile(info, content)
    check(read_cifar10(tmp_path / "cifar.tar", train=False), NAMES[5:])


ARCHIVE = archive_of({"test_batch.bin": TEST[:3073]})


@QUICK
@given(flip=flips(512))
def test_flipped_header_of_an_archive_gives_rows_or_is_refused(flip, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped.tar"
    path.write_bytes(flipped(ARCHIVE, flip))
    opens_or_is_refused(lambda: read_cifar10(path, train=False))


@QUICK
@example(flip=(144, 16))  # another code for the same bytes
@given(flip=flips(len(packed(ARCHIVE)) - 10))
def test_flipped_byte_of_a_gzipped_archive_changes_nothing_or_is_refused(flip, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped.tar.gz"
    position, bits = flip
    path.write_bytes(flipped(packed(ARCHIVE), (position + 10, bits)))  # the header's time and flags are for people
    # Some flips change nothing: two codes of a compressor may stand for the same bytes.
    opened = opens_or_is_refused(lambda: read_cifar10(path, train=False))
    assert not opened or gzip.decompress(path.read_bytes()) == ARCHIVE


@QUICK
@given(length=st.integers(0, len(packed(ARCHIVE)) - 1))
def test_truncated_archive_is_refused(length, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "truncated.tar.gz"
    path.write_bytes(packed(ARCHIVE)[:length])
    assert not opens_or_is_refused(lambda: read_cifar10(path, train=False))
