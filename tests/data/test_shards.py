"""Shards hold what the source held, are whole or not there, and tell when they are no longer what was written."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from damage import flipped, flips, given, opens_or_is_refused, QUICK, read_all, st

from mf_eqx.data import _shards
from mf_eqx.data._shards import ShardSource, write_shards
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


@pytest.mark.parametrize("dtype", ["u1", "f2", "f8", "i4", ">f4"])
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


def test_files_are_plain_npy(folder):
    np.testing.assert_array_equal(np.load(folder / "x_00001.npy"), X[4:8])
    np.testing.assert_array_equal(np.load(folder / "label_00002.npy"), LABEL[8:])


def test_manifest_tells_every_file(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("version", "rows", "row_shape", "dtype", "labels")} == {
        "version": 1,
        "rows": 11,
        "row_shape": [2, 3],
        "dtype": "float32",
        "labels": 4,
    }
    files = manifest["x"] + manifest["label"]
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
    monkeypatch.setattr(_shards, "_PIECE", 3 * X[0].nbytes)
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


def test_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(ValueError, match="must be a new or empty folder, got one with files"):
        write(tmp_path)
    assert os.listdir(tmp_path) == ["mine"]


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(ValueError, match="mine: must be a new or empty folder, got a file"):
        write(tmp_path / "mine")


def test_shards_of_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows_per_shard must be >= 1, got 0"):
        write(tmp_path / "s", rows_per_shard=0)


def test_dtype_that_npy_does_not_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"arrays: dtype must be one that .npy files keep, got bfloat16"):
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
        (lambda rows: rows._replace(x=rows.x[:, :1]), r"x must be float32 of shape \(4, 2, 3\) from row 0"),
        (lambda rows: rows._replace(x=rows.x.astype(float)), r"from row 0, got float64 of shape \(4, 2, 3\)"),
        (lambda rows: rows._replace(x=rows.x[1:]), r"from row 0, got float32 of shape \(3, 2, 3\)"),
        (lambda rows: rows._replace(label=None), "label must be given exactly if labels is, from row 0"),
        (lambda rows: rows._replace(label=rows.label + 4), r"from row 0: label must lie in \[0, 3\]"),
    ],
)
def test_source_that_gives_something_else_is_refused_and_leaves_nothing(change, message, tmp_path):
    with pytest.raises(ValueError, match=f"wrong.*{message}"):
        write_shards(Wrong(change), tmp_path / "s", rows_per_shard=4)
    assert os.listdir(tmp_path) == []


SLOW = """
import sys, time
import numpy as np
from mf_eqx.data._shards import write_shards
from mf_eqx.data._source import ArraySource

def progress(rows):
    print(rows, flush=True)
    time.sleep(60 if rows >= 8 else 0)

write_shards(ArraySource(np.zeros((11, 2))), sys.argv[1], rows_per_shard=4, progress=progress)
"""


@pytest.mark.parametrize(("signal_", "left"), [(signal.SIGKILL, 1), (signal.SIGINT, 0)])
def test_killed_conversion_leaves_no_folder_of_the_name(signal_, left, tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "4\n" and process.stdout.readline() == "8\n"
        time.sleep(0.05)
        process.send_signal(signal_)
        assert process.wait(30) != 0
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
    with pytest.raises(ValueError, match=r"x_00001.npy: must hold 224 bytes as manifest.json tells, got 223"):
        ShardSource(folder)


@pytest.mark.parametrize("name", ["x_00002.npy", "label_00000.npy"])
def test_changed_data_are_refused_by_verifying(name, folder):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(flipped(content, (len(content) - 4, 1)))
    source = ShardSource(folder)
    with pytest.raises(ValueError, match=f"{name}: must have SHA-256 .* as manifest.json tells, got "):
        source.verify()
    with pytest.raises(ValueError, match=f"{name}: must have SHA-256"):
        ShardSource(folder, verify=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON, got: "),
        (b"{", "must be JSON, got: "),
        (b"\xff\xfe\xfd", "must be JSON, got: "),
        (b"[" * 100_000, "must be JSON, got: "),
        (b"1" * 10_000, "must be JSON, got: "),
        (b"[]", "must be an object, got list"),
        (b"{}", "must have version, rows, .*; got no version, rows, row_shape, dtype, labels, x, label, digest"),
        (b'{"version": 2, "more": 1}', "version must be 1, got 2"),
    ],
)
def test_manifest_that_is_none_is_refused(content, message, folder):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"manifest.json: {message}"):
        ShardSource(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(more=1), "must have .* alone, got more too"),
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
        (lambda m: m.update(labels=None), "label must be given exactly if labels is, got list of 3"),
        (lambda m: m.update(labels="4"), "labels must be an integer >= 1 or null, got '4'"),
        (lambda m: m.update(x=[]), "x must be a list of files, got list of 0"),
        (lambda m: m["label"].pop(), "label must have 3 files as x has, got 2"),
        (lambda m: m["x"].append(3), "x 3: must be an object, got int"),
        (lambda m: m["x"][1].pop("bytes"), "x 1: must have name, rows, bytes, sha256; got no bytes"),
        (lambda m: m["x"][1].update(name="../x_00001.npy"), r"x 1: name must be x_00001.npy, got '../x_00001.npy'"),
        (lambda m: m["x"][1].update(name="/etc/passwd"), r"x 1: name must be x_00001.npy, got '/etc/passwd'"),
        (lambda m: m["x"].reverse(), r"x 0: name must be x_00000.npy, got 'x_00002.npy'"),
        (lambda m: m["x"][0].update(rows=5), r"x must be \[4, 4, 3\] as in its files, got \[5, 4, 3\]"),
        (lambda m: m["x"][0].update(bytes=5), r"x_00000.npy: must hold 5 bytes as manifest.json tells, got 224"),
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
    with pytest.raises(ValueError, match=r"manifest.json: digest must be \w+... of the rest, got "):
        ShardSource(folder)


@pytest.mark.parametrize("name", ["manifest.json", "x_00001.npy", "label_00001.npy"])
@QUICK
@given(data=st.data())
def test_flipped_byte_is_refused_by_verifying(data, name, whole, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    flip = data.draw(flips(len(whole[name])))
    for file, content in whole.items():
        (folder / file).write_bytes(flipped(content, flip) if file == name else content)
    if opens_or_is_refused(lambda: ShardSource(folder, verify=True)):
        # Space between the words of a manifest may change, nothing else.
        assert json.loads((folder / name).read_text()) == json.loads(whole[name])
