"""Data sets of every kind become shards by one command; bad input ends in one line and leaves nothing."""

import functools
import io
import os
import pathlib
import re

import numpy as np
import pytest
from image_files import save_cifar10, save_idx, save_mnist

from mf_eqx import data, run

RANDOM = np.random.default_rng(6)
X = RANDOM.integers(0, 256, (10, 3, 32, 32), np.uint8)
LABEL = RANDOM.integers(0, 10, 10).astype(np.uint8)


@pytest.fixture(scope="module")
def prepare_data(experiment):
    return experiment("prepare_data")


@pytest.fixture
def convert(prepare_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def convert(arguments):
        run.main(prepare_data.main, prepare_data.Config(), argv=arguments.split())

    return convert


@pytest.fixture
def refused(convert, refusal_of):
    """The last line of the command, after those of the progress."""
    return functools.partial(refusal_of, convert, progress=True)


def save(path, *arrays):
    for number, array in enumerate(arrays):
        np.save(f"{path}_{number}.npy", array)


def check(folder, x, label=None):
    source = data.ShardSource(folder, verify=True)
    rows = source.take(np.arange(len(source)))
    np.testing.assert_array_equal(rows.x, x)
    np.testing.assert_array_equal(rows.label, label)


def test_cifar10_becomes_shards(convert, capsys):
    save_cifar10("cifar", X, LABEL, test=(X[:3], LABEL[:3]))
    convert("--cifar10 cifar --to shards --rows-per-shard 4")
    check("shards", X, LABEL)
    names = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
    line = rf"shards: 10 rows of shape \(3, 32, 32\), uint8, 10 labels \({names}\), 30,720 bytes, \d+\.\d s\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_test_part_of_cifar10_becomes_shards(convert):
    save_cifar10("cifar", X, LABEL, test=(X[:3], LABEL[:3]))
    convert("--cifar10 cifar --split test --to shards")
    check("shards", X[:3], LABEL[:3])


def test_idx_becomes_shards(convert):
    save_idx("x", X[:, 0])
    save_idx("y", LABEL)
    convert("--idx x y --labels 10 --to shards")
    check("shards", X[:, :1], LABEL)


def test_each_part_of_a_folder_of_idx_files_becomes_shards(convert):
    save_mnist("idx", (X[:6, 0], LABEL[:6]), (X[6:, 0], LABEL[6:]))
    convert("--idx idx --to train")
    convert("--idx idx --split test --labels 10 --to test")
    check("train", X[:6, :1], LABEL[:6])
    check("test", X[6:, :1], LABEL[6:])


def test_npy_becomes_shards(convert):
    save("x", X[:4], X[4:])
    save("y", LABEL[:4], LABEL[4:])
    convert("--npy x_0.npy x_1.npy --npy-label y_0.npy y_1.npy --to deep/shards")
    check("deep/shards", X, LABEL)


def test_npy_with_conditions_becomes_shards(convert, capsys):
    condition = RANDOM.standard_normal((10, 12)).astype(np.float32)
    save("x", X[:4], X[4:])
    save("c", condition[:4], condition[4:])
    convert("--npy x_0.npy x_1.npy --npy-condition c_0.npy c_1.npy --to shards --rows-per-shard 3")
    np.testing.assert_array_equal(data.ShardSource("shards", verify=True).take(np.arange(10)).condition, condition)
    line = r"shards: 10 rows of shape \(3, 32, 32\), uint8, condition float32 of shape \(12,\), 31,200 bytes, "
    assert re.match(line, capsys.readouterr().out)


def test_conditions_without_npy_are_refused(refused):
    save_cifar10("cifar", X, LABEL, test=(X[:3], LABEL[:3]))
    line = refused("--cifar10 cifar --npy-condition c.npy --to shards")
    assert "--npy-condition must be given with --npy, got --cifar10" in line


def test_images_become_shards(convert):
    image = pytest.importorskip("PIL.Image")
    for name, x in zip("ab", X, strict=False):
        os.makedirs(f"images/{name}")
        image.fromarray(x.transpose(1, 2, 0)).save(f"images/{name}/x.png")
    convert("--images images --size 32 --to shards")
    check("shards", X[:2], [0, 1])
    assert data.ShardSource("shards").class_names == ("a", "b")


def test_files_in_a_folder_of_images_that_are_no_images_are_told(convert, capsys):
    image = pytest.importorskip("PIL.Image")
    os.makedirs("images")
    image.fromarray(X[0].transpose(1, 2, 0)).save("images/x.png")
    for name in ("a.gif", "b.gif", "c.txt"):
        pathlib.Path("images", name).write_text("text")
    convert("--images images --size 32 --to shards")
    assert "images: 1 images; passed over: 2 .gif, 1 .txt\n" in capsys.readouterr().out


def test_array_records_become_shards(convert):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter("rows", "group_size:1")
    for x, label in zip(X, LABEL, strict=True):
        stream = io.BytesIO()
        np.savez(stream, x=x, label=label)
        writer.write(stream.getvalue())
    writer.close()
    convert("--array-record rows --labels 10 --to shards")
    check("shards", X, LABEL)


def test_whole_shards_are_verified(convert, capsys):
    save("x", X)
    convert("--npy x_0.npy --to shards")
    convert("--verify shards")
    assert "shards: as written, 10 rows of shape (3, 32, 32), uint8, no labels" in capsys.readouterr().out


def test_changed_shards_are_refused_by_name(convert, refused):
    save("x", X)
    convert("--npy x_0.npy --to shards")
    with open("shards/x_00000.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([X[-1, -1, -1, -1] ^ 1]))
    assert "shards/x_00000.npy: must have SHA-256" in refused("--verify shards")


def test_values_that_are_not_finite_leave_nothing(refused):
    save("x", np.array([[0.0], [np.nan]]))
    line = refused("--npy x_0.npy --to shards")
    assert "x_0.npy: x must be finite, got NaN or infinity in row 1" in line
    assert os.listdir() == ["x_0.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--to shards", "exactly one of --cifar10, --idx, --images, --npy, --array-record, --verify must .* got none"),
        ("--cifar10 a --npy b --to shards", "exactly one of .* must be given, got --cifar10 and --npy"),
        ("--cifar10 a", "--to must be given with --cifar10, got none"),
        ("--images a --to shards", "--size must be given with --images, got none"),
        ("--cifar10 a --size 8 --to shards", "--size must be given with --images, got --cifar10"),
        ("--idx a --npy-label b --to shards", "--npy-label must be given with --npy, got --idx"),
        (
            "--cifar10 a --labels 8 --to b",
            "--labels must be given with --idx or --npy or --array-record, got --cifar10",
        ),
        ("--verify a --to b", "--to must be given with --cifar10 or .* got --verify"),
        ("--idx a b c --to d", "--idx must be a file of images and at most one of labels, got 3 files"),
        ("--npy a --rows-per-shard 0", "--rows-per-shard must be >= 1, got 0"),
        ("--npy a --labels 0", "--labels must be >= 1, got 0"),
        ("--images a --size 0", "--size must be a side >= 1, or height and width, got 0"),
        ("--cifar10 a --split all", "--split"),
        ("--npy missing.npy --to shards", "--npy: No such file or directory: 'missing.npy'"),
        ("--verify missing", "--verify: No such file or directory: 'missing/manifest.json'"),
        ("--cifar10 . --to shards", "must hold data_batch_1.bin to data_batch_5.bin or"),
        ("--images . --size 8 --to shards", "must hold images"),
        (
            "--npy a --split test --to b",
            "--split must be left out but for CIFAR-10 and a folder of IDX",
        ),
        ("--idx a b --split test --to c", "--split must be left out but for CIFAR-10 and a folder of IDX"),
        ("--idx . --split test --to shards", ".: must hold IDX files as of MNIST for --split test, got none"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, message, refused):
    assert re.search(message, refused(arguments))
    assert os.listdir() == []
