"""Shards hold what the source held, are whole or not there, and tell when they are no longer what was written."""

import errno
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainer
from damage import flipped, flips, given, opens_or_is_refused, QUICK, read_all, st

from mf_eqx import _json, data, run
from mf_eqx.data import _manifest, _shard_writer
from mf_eqx.data._shard_source import ShardSource
from mf_eqx.data._shard_writer import write_shards
from mf_eqx.data._source import ArraySource

RANDOM = np.random.default_rng(4)
X = RANDOM.normal(size=(11, 2, 3)).astype(np.float32)
LABEL = RANDOM.integers(0, 4, 11)


class Wrong(ArraySource):
    """Gives something else than it says."""

    def __init__(self, change):
        ArraySource.__init__(self, X, LABEL, labels=4, name="wrong")
        self.change = change

    def take(self, rows):
        return self.change(ArraySource.take(self, rows))


def write(folder, x=X, label=LABEL, labels=4, rows_per_shard=4, **others):
    write_shards(ArraySource(x, label, labels=labels), folder, rows_per_shard=rows_per_shard, **others)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "shards")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Content of all files of a folder, by name."""
    root = write(tmp_path_factory.mktemp("whole") / "shards")
    return {path.name: path.read_bytes() for path in root.iterdir()}


def changed_manifest(folder, change):
    """The manifest with something else in it, and the digest that belongs to that."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    values["digest"] = ""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("rows_per_shard", [1, 4, 11, 4096])
def test_shards_hold_what_the_source_held(rows_per_shard, tmp_path):
    rows = read_all(ShardSource(write(tmp_path / "s", rows_per_shard=rows_per_shard), verify=True))
    np.testing.assert_array_equal(rows.x, X)
    np.testing.assert_array_equal(rows.label, LABEL)


def test_rows_come_in_the_order_asked_for(folder):
    rows = np.array([10, 0, 4, 3, 10])
    np.testing.assert_array_equal(ShardSource(folder).take(rows).x, X[rows])


@pytest.mark.parametrize("dtype", ["u1", "f2", "f8", ">f4"])
def test_every_dtype_is_kept(dtype, tmp_path):
    x = (10 * np.abs(X)).astype(dtype)
    source = ShardSource(write(tmp_path / "s", x))
    assert source.dtype == x.dtype.newbyteorder("=")
    np.testing.assert_array_equal(read_all(source).x, x)


def test_source_without_labels_leaves_none(tmp_path):
    source = ShardSource(write(tmp_path / "s", label=None, labels=None), verify=True)
    assert source.labels is None
    np.testing.assert_array_equal(read_all(source).x, X)


def test_number_of_labels_is_kept(tmp_path):
    assert ShardSource(write(tmp_path / "s", labels=9)).labels == 9


def test_names_of_classes_are_kept_and_are_part_of_the_digest(folder, tmp_path):
    write_shards(ArraySource(X, LABEL, class_names=("ant", "bee", "ca\u00f1a", "d")), tmp_path / "s")
    source = ShardSource(tmp_path / "s", verify=True)
    assert (source.labels, source.class_names) == (4, ("ant", "bee", "ca\u00f1a", "d"))
    assert ShardSource(folder).class_names is None
    changed_manifest(folder, lambda m: m.update(class_names=["ant", "bee", "cat", "d"]))
    assert ShardSource(folder).class_names == ("ant", "bee", "cat", "d")


@pytest.mark.parametrize(("most", "name"), [(100, "x_00000.npy"), (300, "manifest.json")])
def test_a_full_disk_names_the_file(most, name, full_disk, tmp_path):
    """That of the data, or the manifest, which is longer than all others."""
    with full_disk(most), pytest.raises(OSError, match=rf"File too large: .*{name}'"):
        write(tmp_path / "shards", rows_per_shard=2)


def test_files_are_plain_npy(folder):
    np.testing.assert_array_equal(np.load(folder / "x_00001.npy"), X[4:8])
    np.testing.assert_array_equal(np.load(folder / "label_00002.npy"), LABEL[8:])


def test_manifest_tells_every_file(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("version", "rows", "row_shape", "dtype", "labels")} == {
        "version": 4,
        "rows": 11,
        "row_shape": [2, 3],
        "dtype": "float32",
        "labels": 4,
    }
    files = manifest["x"] + manifest["label"] + manifest["crc"]
    assert sorted(file["name"] for file in files) == sorted(set(os.listdir(folder)) - {"manifest.json"})
    for file in files:
        content = (folder / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_digest_is_that_of_the_data(tmp_path):
    digests = [
        ShardSource(write(tmp_path / str(number), x, label)).digest
        for number, (x, label) in enumerate([(X, LABEL), (X, LABEL), (X + 1, LABEL), (X, 3 - LABEL)])
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_progress_counts_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(_shard_writer, "_PIECE", 3 * X[0].nbytes)
    seen = []
    folder = write(tmp_path / "s", progress=seen.append)
    assert seen == [3, 4, 7, 8, 11]
    np.testing.assert_array_equal(read_all(ShardSource(folder, verify=True)).x, X)


def test_progress_of_verifying_counts_rows(folder):
    seen = []
    ShardSource(folder).verify(progress=seen.append)
    assert seen == [4, 8, 11]


# Writing that is refused or fails


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "s").mkdir()
    assert len(ShardSource(write(tmp_path / "s"))) == 11


@pytest.mark.parametrize("exists", [True, False])
def test_folder_to_which_a_link_points_is_filled(exists, tmp_path):
    if exists:
        (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    write(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    assert len(ShardSource(tmp_path / "there")) == len(ShardSource(tmp_path / "link")) == 11


def busy(source, target):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), source, None, target)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "must be a folder that can be replaced, got the current directory"),
        ("loop", "must be a new or empty folder, got a symbolic link to itself"),
        ("mount", "Device or resource busy: must be a folder that can be replaced, no mount point: '.*mount'"),
    ],
)
def test_folder_that_no_rename_can_replace_is_refused_before_rows_are_read(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "loop":
        (tmp_path / "loop").symlink_to("loop")
    if name == "mount":
        (tmp_path / "mount").mkdir()
        monkeypatch.setattr(os, "rename", busy)
    before, read = list(tmp_path.iterdir()), []
    with pytest.raises((ValueError, OSError), match=message):
        write_shards(Wrong(lambda rows: read.append(rows) or rows), name)
    assert not read and list(tmp_path.iterdir()) == before


def test_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(ValueError, match="must be a new or empty folder, got one with files"):
        write(tmp_path)
    assert os.listdir(tmp_path) == ["mine"]


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(ValueError, match="mine: must be a new or empty folder, got a file"):
        write(tmp_path / "mine")


class Fewer(ArraySource):
    """Says that it has fewer rows than it has, or others."""

    def __init__(self, length, row_shape):
        ArraySource.__init__(self, X, LABEL)
        self.length, self.row_shape = length, row_shape

    def __len__(self):
        return self.length


@pytest.mark.parametrize(("length", "row_shape"), [(0, (2, 3)), (11, (2, 0))])
def test_source_of_nothing_is_refused(length, row_shape, tmp_path):
    with pytest.raises(ValueError, match="arrays: must have at least one row and no empty axis, got "):
        write_shards(Fewer(length, row_shape), tmp_path / "s")
    assert os.listdir(tmp_path) == []


def test_shards_of_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows_per_shard must be an integer >= 1, got 0"):
        write(tmp_path / "s", rows_per_shard=0)


def test_more_shards_than_a_manifest_may_name_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="rows_per_shard must give at most 50,000 shards, got 1 with 50,001 shards"):
        write(tmp_path / "s", np.zeros((50_001, 1), np.uint8), None, None, rows_per_shard=1)
    assert not list(tmp_path.iterdir())


def test_manifest_of_as_many_shards_as_may_be_written_can_be_read():
    share = _shard_writer._MOST_SHARDS // 100
    files = [
        [_manifest.File(_manifest.name_of_file(kind, n), 1 << 20, 1 << 40, "0" * 64) for n in range(100)]
        for kind in ("x", "label", "crc")
    ]
    text = _manifest.as_text(_manifest.Manifest(_manifest.VERSION, 100, [1], "uint8", 1, *files, None, None, None, ""))
    assert share * len(text) < _json._MAX_BYTES
    assert share * sum(map(text.count, ",[{")) < _json._MAX_VALUES


@pytest.mark.parametrize("rows_per_shard", [2.5, True])
def test_rows_per_shard_that_are_no_integer_are_refused(unchecked, rows_per_shard, tmp_path):
    with pytest.raises(ValueError, match=f"rows_per_shard must be an integer >= 1, got {rows_per_shard}"):
        write(tmp_path / "s", rows_per_shard=rows_per_shard)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int64, np.longdouble])
def test_dtype_that_is_never_trained_on_is_refused_and_leaves_nothing(dtype, tmp_path):
    x = X.astype(dtype)
    message = f"arrays: x must be uint8 or floating point of at most 64 bits, got {x.dtype}"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s", x)
    assert os.listdir(tmp_path) == []


def test_dtype_that_npy_does_not_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"arrays: dtype must be one that .npy files can store, got bfloat16"):
        write(tmp_path / "s", X.astype(jnp.bfloat16))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_row_and_leave_nothing(value, tmp_path):
    x = X.copy()
    x[6, 1, 2] = value
    with pytest.raises(ValueError, match="arrays: x must be finite, got NaN or infinity in row 6"):
        write(tmp_path / "s", x)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows._replace(x=rows.x[:, :1]), r"x must be float32 of shape \(4, 2, 3\), got"),
        (lambda rows: rows._replace(x=rows.x.astype(float)), r"got float64 of shape \(4, 2, 3\)"),
        (lambda rows: rows._replace(x=rows.x[1:]), r"got float32 of shape \(3, 2, 3\)"),
        (
            lambda rows: rows._replace(label=None),
            "label must be given if and only if labels is, got no label with labels = 4",
        ),
        (lambda rows: rows._replace(label=rows.label + 4), r"label must lie in \[0, 3\], got \d in row 0"),
    ],
)
def test_source_that_gives_something_else_is_refused_and_leaves_nothing(change, message, tmp_path):
    with pytest.raises(ValueError, match=f"wrong.*{message}"):
        write_shards(Wrong(change), tmp_path / "s", rows_per_shard=4)
    assert os.listdir(tmp_path) == []


SLOW = """
import signal, sys, time
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background of a script
from mf_eqx.data._shard_writer import write_shards
from mf_eqx.data._source import ArraySource

def progress(rows):
    print(rows, flush=True)
    time.sleep(600 if rows >= 8 else 0)

write_shards(ArraySource(np.zeros((11, 2))), sys.argv[1], rows_per_shard=4, progress=progress)
"""


@pytest.mark.rehearsal
@pytest.mark.parametrize(("signal_", "left"), [(signal.SIGKILL, 1), (signal.SIGINT, 0)])
def test_killed_conversion_leaves_no_folder_of_the_name(signal_, left, tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "4\n" and process.stdout.readline() == "8\n"
        time.sleep(0.05)
        process.send_signal(signal_)
        assert process.wait(300) != 0
    names = os.listdir(tmp_path)
    assert len(names) == left and all(name.startswith(".s.") and name.endswith(".partial") for name in names)


def test_conversion_deletes_what_killed_ones_to_the_same_place_left(tmp_path):
    names = [".s.0123abcd.partial", ".s.4567abcd.partial", ".s.more.0123abcd.partial", ".t.0123abcd.partial"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x_00000.npy").write_bytes(b"")
        os.utime(tmp_path / name, (0, 0))
        # The second is still written to, whatever the time of its folder.
        os.utime(tmp_path / name / "x_00000.npy", None if name == names[1] else (0, 0))
    write(tmp_path / "s")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "s"])


# Reading what is no longer what was written


def test_device_in_place_of_the_manifest_is_refused(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"manifest.json: must be an ordinary file, got a pipe, a device or the like"):
        ShardSource(folder)


def test_device_that_took_the_place_of_a_file_is_refused_by_verifying(folder):
    source = ShardSource(folder)
    (folder / "label_00000.npy").unlink()
    (folder / "label_00000.npy").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"label_00000.npy: must be an ordinary file, got a pipe"):
        source.verify()


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        ShardSource(tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none" / "manifest.json")


def test_missing_file_is_named(folder):
    (folder / "x_00001.npy").unlink()
    with pytest.raises(FileNotFoundError) as missing:
        ShardSource(folder)
    assert str(missing.value.filename) == str(folder / "x_00001.npy")


def test_file_of_another_length_is_refused(folder):
    path = folder / "x_00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x_00001.npy: must hold 224 bytes as manifest.json says, got 223"):
        ShardSource(folder)


def flip(path, flip):
    path.write_bytes(flipped(path.read_bytes(), flip))


def test_changed_data_are_refused_by_verifying(folder):
    flip(folder / "x_00002.npy", (-4, 1))
    source = ShardSource(folder)
    with pytest.raises(ValueError, match=r"x_00002.npy: must have SHA-256 .* as manifest.json says, got "):
        source.verify()
    with pytest.raises(ValueError, match=r"x_00002.npy: must have SHA-256"):
        ShardSource(folder, verify=True)


@pytest.mark.parametrize("name", ["label_00000.npy", "crc_00001.npy"])
def test_changed_labels_and_checksums_are_refused_by_opening(name, folder):
    flip(folder / name, (-4, 1))
    with pytest.raises(ValueError, match=f"{name}: must have SHA-256 .* as manifest.json says, got "):
        ShardSource(folder)


@pytest.mark.parametrize("name", ["x_00001.npy", "label_00001.npy", "crc_00002.npy"])
def test_file_that_changed_after_opening_is_refused_by_verifying(name, folder):
    source = ShardSource(folder)
    flip(folder / name, (-4, 1))
    with pytest.raises(ValueError, match=f"{name}: must have SHA-256"):
        source.verify()


def test_file_that_holds_something_else_than_checksums_is_refused(folder):
    """The manifest agrees with the file; the data are those of another program."""
    np.save(folder / "crc_00000.npy", np.zeros((2, 2), "<i4"))
    content = (folder / "crc_00000.npy").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    changed_manifest(folder, lambda m: m["crc"][0].update(bytes=len(content), sha256=sha256))
    with pytest.raises(ValueError, match=r"crc_00000.npy: must be uint32 of shape \(4,\), got int32 of shape \(2, 2\)"):
        ShardSource(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON, but it cannot be read: "),
        (b"{", "must be JSON, but it cannot be read: "),
        (b"\xff\xfe\xfd", "must be JSON, but it cannot be read: "),
        (b"[" * 100_000, "must be JSON, but it cannot be read: "),
        (b"1" * 10_000, "must be JSON, but it cannot be read: "),
        (b'{"x": [' + b"[], " * 1_100_000 + b"[]]}", "must be JSON, but it cannot be read: it has more than 1,048,576"),
        (b"[]", "must be an object, got list"),
        (b"{}", "must have version, rows, .*; got no version, .*, row_condition, condition, class_names, digest"),
        (b'{"version": 3, "more": 1}', "version must be 4, got 3: the data must be converted again"),
    ],
)
def test_manifest_that_is_none_is_refused(content, message, folder):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"manifest.json: {message}"):
        ShardSource(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(more=1), "must have only .*, got more too"),
        (lambda m: m.pop("dtype"), "got no dtype"),
        (lambda m: m.update(rows=12), "rows must be 11 as in its files, got 12"),
        (lambda m: m.update(rows=0), "rows must be an integer >= 1, got 0"),
        (lambda m: m.update(rows=11.0), r"rows must be an integer >= 1, got 11.0"),
        (lambda m: m.update(rows=True), "rows must be an integer >= 1, got True"),
        (lambda m: m.update(row_shape=[3, 2]), r"row_shape must be \[2, 3\] as in its files, got \[3, 2\]"),
        (lambda m: m.update(row_shape=[-2, -3]), "row_shape must be a list of integers >= 1, got list of 2"),
        (lambda m: m.update(row_shape="23"), "row_shape must be a list of integers >= 1, got '23'"),
        (lambda m: m.update(dtype="float64"), "dtype must be float32 as in its files, got float64"),
        (lambda m: m.update(dtype=[[[]]]), "dtype must be a name, got list of 1"),
        (lambda m: m.update(labels=3), r"label_00000.npy: label must lie in \[0, 2\], got 3"),
        (lambda m: m.update(labels=None), "label must be given if and only if labels is, got list of 3"),
        (lambda m: m.update(labels="4"), "labels must be an integer >= 1 or null, got '4'"),
        (lambda m: m.update(class_names=["a"]), "class_names must be a list of a text for each label, got list of 1"),
        (lambda m: m.update(class_names=[1, 2, 3, 4]), "class_names must be a list of a text for each label, got list"),
        (lambda m: m.update(class_names="abcd"), "class_names must be a list of a text for each label, got 'abcd'"),
        (lambda m: m.update(x=[]), "x must be a list of files, got list of 0"),
        (lambda m: m["label"].pop(), "label must have 3 files as x has, got 2"),
        (lambda m: m["crc"].pop(), "crc must have 3 files as x has, got 2"),
        (lambda m: m.update(crc=None), "crc must be a list of files, got None"),
        (lambda m: m["crc"][1].update(name="x_00001.npy"), "crc 1: name must be crc_00001.npy, got 'x_00001.npy'"),
        (lambda m: m["x"].append(3), "x 3: must be an object, got int"),
        (lambda m: m["x"][1].pop("bytes"), "x 1: must have name, rows, bytes, sha256; got no bytes"),
        (lambda m: m["x"][1].update(name="../x_00001.npy"), r"x 1: name must be x_00001.npy, got '../x_00001.npy'"),
        (lambda m: m["x"][1].update(name="/etc/passwd"), r"x 1: name must be x_00001.npy, got '/etc/passwd'"),
        (lambda m: m["x"].reverse(), r"x 0: name must be x_00000.npy, got 'x_00002.npy'"),
        (lambda m: m["x"][0].update(rows=5), r"x must be \[4, 4, 3\] as in its files, got \[5, 4, 3\]"),
        (lambda m: m["x"][0].update(bytes=5), r"x_00000.npy: must hold 5 bytes as manifest.json says, got 224"),
        (lambda m: m["x"][0].update(sha256="0"), "x 0: sha256 must be 64 hexadecimal digits, got '0'"),
    ],
)
def test_manifest_that_tells_something_else_is_refused(change, message, folder):
    changed_manifest(folder, change)
    with pytest.raises(ValueError, match=message):
        ShardSource(folder)


def test_number_of_labels_that_was_changed_is_refused_by_the_digest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"labels": 4', '"labels": 5'))
    with pytest.raises(
        ValueError, match=r"manifest.json: digest must be \w+\.\.\., the digest of the other fields, got "
    ):
        ShardSource(folder)


NAMES = [f"{kind}_0000{number}.npy" for kind in ("x", "label", "crc") for number in range(3)]


@pytest.mark.parametrize("name", ["manifest.json", "x_00001.npy", "label_00001.npy", "crc_00001.npy"])
@QUICK
@given(draws=st.data())
def test_flipped_byte_is_refused_by_verifying(draws, name, whole, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    flip = draws.draw(flips(len(whole[name])))
    for file, content in whole.items():
        (folder / file).write_bytes(flipped(content, flip) if file == name else content)
    if opens_or_is_refused(lambda: ShardSource(folder, verify=True)):
        # Space between the words of a manifest may change, nothing else.
        assert json.loads((folder / name).read_text()) == json.loads(whole[name])


# Conditions that are no labels

TREE = {
    "joints": RANDOM.normal(size=(11, 5)),
    "more": (RANDOM.integers(0, 9, (11, 3)).astype(np.int16), [LABEL > 1, None]),
}


def write_conditions(folder, condition=TREE, rows_per_shard=4):
    write_shards(ArraySource(X, condition=condition), folder, rows_per_shard=rows_per_shard)
    return folder


@pytest.fixture
def conditions(tmp_path):
    return write_conditions(tmp_path / "conditions")


def all_conditions(source):
    return source.take(np.arange(len(source))).condition


@pytest.mark.parametrize("condition", [TREE, TREE["joints"], [LABEL]], ids=["tree", "vector", "list"])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 4096])
def test_shards_hold_the_conditions_that_the_source_held(condition, rows_per_shard, tmp_path):
    source = ShardSource(write_conditions(tmp_path / "s", condition, rows_per_shard), verify=True)
    found = all_conditions(source)
    assert jax.tree.structure(found) == jax.tree.structure(condition)
    for a, b in zip(*map(jax.tree.leaves, (found, condition)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert source.row_condition == ArraySource(X, condition=condition).row_condition and source.labels is None


def test_manifest_tells_shapes_dtypes_and_files_of_conditions(conditions):
    manifest = json.loads((conditions / "manifest.json").read_text())
    array = {"kind": "array", "shape": [], "dtype": "bool"}
    more = [array | {"shape": [3], "dtype": "int16"}, {"kind": "list", "entries": [array, {"kind": "none"}]}]
    expected = {"joints": array | {"shape": [5], "dtype": "float64"}, "more": {"kind": "tuple", "entries": more}}
    assert manifest["row_condition"] == {"kind": "dict", "entries": expected}
    assert (manifest["version"], manifest["labels"], manifest["label"]) == (4, None, None)
    names = [[file["name"] for file in files] for files in manifest["condition"]]
    assert names == [[f"condition_{leaf}_0000{number}.npy" for number in range(3)] for leaf in range(3)]
    np.testing.assert_array_equal(np.load(conditions / names[0][1]), TREE["joints"][4:8])


def test_shards_with_conditions_can_be_written_again(conditions, tmp_path):
    write_shards(ShardSource(conditions), tmp_path / "again", rows_per_shard=4)
    assert ShardSource(tmp_path / "again").digest == ShardSource(conditions).digest


def test_checksums_continue_over_the_condition(conditions):
    rows = zip(X, *(np.asarray(leaf) for leaf in jax.tree.leaves(TREE)), strict=True)
    found = np.concatenate([np.load(conditions / f"crc_0000{number}.npy") for number in range(3)])
    assert found.tolist() == [crc32(b"".join(np.asarray(part).tobytes() for part in row), 0) for row in rows]


@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_changed_condition_is_refused_when_it_is_read_and_by_verifying(leaf, conditions):
    flip(conditions / f"condition_{leaf}_00001.npy", (-1, 1))
    source = ShardSource(conditions)
    rule = r"x_00001.npy: row 7 \(row 3 in this file\), with its condition, must have CRC-32 [0-9a-f]{8} as it was"
    with pytest.raises(ValueError, match=rule):
        source.take(np.array([0, 7]))
    with pytest.raises(ValueError, match=rf"condition_{leaf}_00001.npy: must have SHA-256"):
        source.verify()


def test_condition_file_of_another_length_is_refused(conditions):
    path = conditions / "condition_1_00002.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"condition_1_00002.npy: must hold 146 bytes as manifest.json says, got 145"):
        ShardSource(conditions)


def entry(manifest, *path):
    return functools.reduce(lambda node, key: node["entries"][key], path, manifest["row_condition"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("condition"), "got no condition"),
        (lambda m: m.update(condition=None), "condition must be a list for each of the 3 arrays .*, got None"),
        (lambda m: m.update(row_condition=None), "row_condition must describe arrays, dictionaries, tuples and lists"),
        (lambda m: m["row_condition"].update(kind=["dict"]), "row_condition must describe arrays"),
        (lambda m: m["row_condition"].update(kind="list"), "row_condition must have entries that fit the kind list"),
        (lambda m: m["row_condition"].update(entries={}), "row_condition must describe 1 to 100 arrays, got 0"),
        (lambda m: entry(m, "joints").update(shape=[5, 0]), "row_condition must have shapes that are lists of at most"),
        (lambda m: entry(m, "joints").update(dtype="O"), "row_condition must have dtypes among bool, float16, .* 'O'"),
        (lambda m: entry(m, "joints").update(dtype=[]), r"row_condition must have dtypes among .*, got \[\]"),
        (lambda m: entry(m, "joints").update(shape=[6]), "row_condition must be .* as in its files, got "),
        (lambda m: m["condition"].pop(), "condition must be a list for each of the 3 arrays of row_condition"),
        (
            lambda m: m.update(
                label=[file | {"name": file["name"].replace("crc", "label")} for file in m["crc"]], labels=3
            ),
            "condition must be a list for each of .*, without labels",
        ),
        (lambda m: m["condition"][1].pop(), "condition_1 must have 3 files as x has, got 2"),
        (lambda m: m.update(condition=[1, 2, 3]), "condition must be lists of files, got 1"),
        (
            lambda m: m["condition"][1][0].update(name="../condition_1_00000.npy"),
            r"condition_1 0: name must be condition_1_00000.npy, got '../condition_1_00000.npy'",
        ),
    ],
)
def test_manifest_that_tells_something_else_of_conditions_is_refused(change, message, conditions):
    changed_manifest(conditions, change)
    with pytest.raises(ValueError, match=message):
        ShardSource(conditions)


def test_condition_of_very_many_levels_is_refused(conditions):
    def deepen(manifest):
        for _ in range(20):
            manifest["row_condition"] = {"kind": "list", "entries": [manifest["row_condition"]]}

    changed_manifest(conditions, deepen)
    with pytest.raises(ValueError, match=r"row_condition must describe arrays, .* in at most 16 levels"):
        ShardSource(conditions)


class Named(NamedTuple):
    joints: np.ndarray


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ([Named(X[:, 0])], r"condition\[0\] must be made of dictionaries with text as keys, .*, got Named"),
        ({"a": {1: X}}, r"condition\['a'\] must be made of dictionaries with text as keys, .*, got dict"),
        ({"a": X.astype(jnp.bfloat16)}, r"condition\['a'\] must be of a dtype that .npy files can store, got bfloat16"),
        (
            functools.reduce(lambda tree, _: [tree], range(20), X),
            r"condition\[0\].* must have at most 16 levels, got more",
        ),
    ],
)
def test_condition_that_files_cannot_keep_is_refused_and_leaves_nothing(condition, message, tmp_path):
    with pytest.raises(ValueError, match=f"arrays: {message}"):
        write_conditions(tmp_path / "s", condition)
    assert not list(tmp_path.iterdir())


def test_values_of_conditions_are_checked_before_they_are_written(tmp_path):
    condition = TREE["joints"].copy()
    condition[9, 2] = np.nan
    with pytest.raises(ValueError, match="arrays: condition must be finite, got NaN or infinity in row 9"):
        write_conditions(tmp_path / "s", condition)
    assert not list(tmp_path.iterdir())


# Rows that are no longer what was written


def crc32(content, start):
    """By the definition, bit by bit: the polynomial 0x04C11DB7, least significant bit first."""
    register = start ^ 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize("label", [LABEL, None])
@pytest.mark.parametrize("dtype", ["u1", ">f4", "f2"])
def test_checksums_are_those_of_the_bytes_in_the_file_and_the_label(dtype, label, tmp_path):
    assert crc32(b"123456789", 0) == 0xCBF43926  # the check value of the catalogues of CRCs
    x = (10 * np.abs(X)).astype(dtype)
    folder = write(tmp_path / "s", x, label, None if label is None else 4)
    size, labels = 6 * x.itemsize, np.zeros(11, int) if label is None else label
    content = b"".join((folder / f"x_0000{number}.npy").read_bytes()[-rows * size :] for number, rows in ROWS)
    found = np.concatenate([np.load(folder / f"crc_0000{number}.npy") for number, _ in ROWS])
    assert found.dtype == np.dtype("<u4")
    assert found.tolist() == [crc32(content[i * size : (i + 1) * size], int(labels[i])) for i in range(11)]


ROWS = ((0, 4), (1, 4), (2, 3))
"""Shards and their rows."""


@pytest.mark.parametrize(("name", "place", "row", "within"), [("x_00001.npy", 2, 6, 2), ("x_00000.npy", 0, 0, 0)])
def test_changed_row_is_refused_by_file_and_number_when_it_is_read(name, place, row, within, folder):
    flip(folder / name, (len((folder / name).read_bytes()) - (4 - place) * X[0].nbytes, 16))
    source = ShardSource(folder)
    others = np.delete(np.arange(11), row)
    np.testing.assert_array_equal(source.take(others).x, X[others])
    rule = rf"{name}: row {row} \(row {within} in this file\) must have CRC-32 [0-9a-f]{{8}} as it was written, got "
    with pytest.raises(ValueError, match=rule):
        source.take(np.array([10, row, 3]))


def test_row_that_changes_after_opening_is_refused(folder):
    source = ShardSource(folder)
    assert read_all(source).label.tolist() == LABEL.tolist()
    with open(folder / "x_00002.npy", "r+b") as file:  # in place, as a disk does it
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"x_00002.npy: row 10 \(row 2 in this file\) must have CRC-32"):
        source.take(np.array([10]))


def test_rows_in_the_place_of_others_are_refused(folder):
    """Two good rows, each where the other was."""
    path = folder / "x_00000.npy"
    content, size = path.read_bytes(), X[0].nbytes
    start = len(content) - 4 * size
    swapped = content[start + size : start + 2 * size] + content[start : start + size]
    path.write_bytes(content[:start] + swapped + content[start + 2 * size :])
    with pytest.raises(ValueError, match=r"x_00000.npy: row 0 \(row 0 in this file\) must have CRC-32"):
        read_all(ShardSource(folder))


def test_no_rows_are_taken_without_a_complaint(folder):
    assert ShardSource(folder).take(np.arange(0)).x.shape == (0, 2, 3)


@pytest.mark.parametrize("name", ["manifest.json", *NAMES])
@QUICK
@given(draws=st.data())
def test_flipped_byte_anywhere_never_gives_other_rows(draws, name, whole, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "flipped_anywhere"
    folder.mkdir(exist_ok=True)
    for file, content in whole.items():
        if not (folder / file).exists():
            (folder / file).write_bytes(content)
    flip = draws.draw(flips(len(whole[name])))
    try:
        (folder / name).write_bytes(flipped(whole[name], flip))
        rows = read_all(ShardSource(folder))
    except ValueError as error:
        assert str(error).startswith(f"{folder}{os.sep}"), error
    else:
        assert (rows.x.tobytes(), rows.label.tobytes()) == (X.tobytes(), LABEL.astype(np.int32).tobytes())
    finally:
        (folder / name).write_bytes(whole[name])


def test_training_on_a_changed_row_ends_with_one_line_that_names_it(tmp_path, capsys):
    pytest.importorskip("grain")
    pytest.importorskip("tyro")
    config = trainer.Config(steps=20)
    source = trainer.Marked(config)
    write_shards(source, tmp_path / "s", rows_per_shard=40)
    path = tmp_path / "s" / "x_00001.npy"
    flip(path, (len(path.read_bytes()) - 40 * 12 + 10 * 12, 1))
    data.Stream(ShardSource(tmp_path / "s"), 16).fingerprint()  # does not see it: the thread that reads ahead does
    with pytest.raises(SystemExit) as ended:
        run.main(functools.partial(train, folder=tmp_path), config, argv=[])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert re.search(r"error: .*s/x_00001.npy: row 50 \(row 10 in this file\) must have CRC-32", line), line


def train(config, folder):
    """Train on the points in a folder of shards."""
    with run.opened(config, root=folder / "runs", script="trainer") as directory:
        trainer.train(config, directory, source=ShardSource(folder / "s"))
