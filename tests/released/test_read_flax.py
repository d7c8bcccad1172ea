"""Files of flax are read without flax, to the last bit; a file that is no such file is refused by its name."""

import os
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("msgpack")
import msgpack
from released_files import extension, flax_tensors, nested, write_flax, write_state

from mf_eqx import released
from mf_eqx._optional import MissingDependency

RULE = "must be a file of flax.serialization.to_bytes, but: "
ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.arange(3, dtype=np.float16),
    "small": np.array([-1, 2], np.int8),
    "large": np.array([2**63], np.uint64),
    "truth": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "none": np.zeros((0, 3), np.float32),
    "number": np.array(2.5, np.float32),
}


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def packed(path, tree):
    """A file of msgpack with whatever there is."""
    path.write_bytes(msgpack.packb(tree))
    return path


def array(shape=(3,), dtype="float32", values=bytes(12), code=1):
    """An extension, right by default."""
    return msgpack.ExtType(code, msgpack.packb([shape, dtype, values]))


def chunked(shape, *chunks):
    pieces = {str(i): extension(chunk) for i, chunk in enumerate(chunks)}
    return {"__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(shape)}, "chunks": pieces}


# What is read


def test_arrays_and_plain_values_are_read_as_written(tmp_path):
    tree = {"a": ARRAYS, "b": {"step": 3, "name": "x", "rate": 0.5, "flag": True, "empty": {}, "nothing": None}}
    assert_same(released.read_flax(write_flax(tmp_path / "state", tree)), tree)


def test_files_of_flax_are_read_as_flax_reads_them(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    tree = {"params": nested(flax_tensors()), "other": ARRAYS, "step": 7, "moments": (np.zeros(2), {"count": 1})}
    content = serialization.to_bytes(tree)
    (tmp_path / "state").write_bytes(content)
    assert_same(released.read_flax(tmp_path / "state"), serialization.msgpack_restore(content))


def test_arrays_that_flax_cuts_into_pieces_are_joined(tmp_path, monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    # 2**30 bytes in truth.
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"params": nested(flax_tensors()), "others": {"matrix": np.arange(34.0).reshape(2, 17)}}
    content = serialization.msgpack_serialize(tree)
    assert content.count(b"__msgpack_chunked_array__") > len(flax_tensors()) / 2
    (tmp_path / "state").write_bytes(content)
    assert_same(released.read_flax(tmp_path / "state"), tree)


def test_pieces_are_joined_in_the_order_of_their_numbers(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(2, 12)
    held = chunked((2, 12), *np.split(whole.ravel(), 12))
    held["chunks"] = dict(sorted(held["chunks"].items()))  # "10" before "2"
    assert_same(released.read_flax(packed(tmp_path / "state", {"a": held}))["a"], whole)


def test_scalars_become_arrays(tmp_path):
    (tmp_path / "state").write_bytes(msgpack.packb({"a": extension(np.array(2.5), code=3)}))
    assert_same(released.read_flax(tmp_path / "state"), {"a": np.array(2.5)})


def test_bfloat16_is_read_into_float32(tmp_path):
    values = np.array([1.5, -3.0, 1e30], jnp.bfloat16)
    assert_same(released.read_flax(write_flax(tmp_path / "state", {"a": values})), {"a": values.astype(np.float32)})


def test_one_part_is_read_alone(tmp_path):
    path = write_state(tmp_path / "state", params=flax_tensors("first"), ema_params=flax_tensors("average"))
    assert_same(released.read_flax(path, "ema_params"), nested(flax_tensors("average")))
    assert_same(released.read_flax(path, "params"), nested(flax_tensors("first")))


def test_all_but_the_part_is_passed_over_unread(tmp_path):
    unknown = {"a": [msgpack.ExtType(77, b"x" * 70_000)] * 40}
    path = packed(tmp_path / "state", {"opt_state": unknown, "params": {"a": array()}, "later": unknown})
    assert_same(released.read_flax(path, "params"), {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="its extensions must be arrays"):
        released.read_flax(path)


@pytest.mark.parametrize("part", ["ema_params", "step"])
def test_a_part_that_is_not_there_is_refused_with_those_that_are(part, tmp_path):
    path = write_state(tmp_path / "state", params=flax_tensors())
    with pytest.raises(
        ValueError, match=f"state: must hold a dictionary named {part}, got opt_state, params, rng, step$"
    ):
        released.read_flax(path, part)


# What is refused


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = write_flax(tmp_path / "state", {"a": {"b": ARRAYS["matrix"]}, "c": 300})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path}: {RULE}"):
            released.read_flax(path)
        with pytest.raises(ValueError, match=f"{path}: "):
            released.read_flax(path, "a")


@pytest.mark.parametrize("part", [None, "a"])
def test_a_file_that_goes_on_is_refused(part, tmp_path):
    path = write_flax(tmp_path / "state", {"a": {"b": ARRAYS["matrix"]}})
    path.write_bytes(path.read_bytes() + b"xyz")
    with pytest.raises(ValueError, match=f"{path}: {RULE}it has 3 more bytes after its end"):
        released.read_flax(path, part)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (array(dtype="object"), "its arrays must be of numbers, got dtype 'object'"),
        (array(dtype="O"), "its arrays must be of numbers, got dtype 'O'"),
        (array(dtype="i4,i4"), "its arrays must be of numbers, got dtype 'i4,i4'"),
        (array(dtype=b"\x00"), "its arrays must be shape, dtype and bytes"),
        (array(values="text"), "its arrays must be shape, dtype and bytes"),
        (array(shape=3), "its arrays must be shape, dtype and bytes"),
        (msgpack.ExtType(1, msgpack.packb([[3], "float32"])), "its arrays must be shape, dtype and bytes"),
        (msgpack.ExtType(1, b"\xc1"), ""),
        (msgpack.ExtType(2, msgpack.packb([1.0, 2.0])), "its extensions must be arrays (1, 3), got 2"),
        (array(shape=(4,)), "its arrays must have the size that their shape says, got 3 values for [4]"),
        (array(shape=(2,)), "its arrays must have the size that their shape says, got 3 values for [2]"),
        (
            array(values=bytes(13)),
            "its arrays must have the size that their shape says, got 3 values and 1 bytes for [3]",
        ),
        (array(shape=(-1, -3)), "its arrays must have the size that their shape says, got 3 values for [-1, -3]"),
        (array(shape=(-1,)), "its arrays must have the size that their shape says, got 3 values for [-1]"),
        (array(shape=(3.0,)), "its arrays must have the size that their shape says, got 3 values for [3.0]"),
        (array(shape=(2**63, 0), values=b""), ""),
        (array(shape=(1,) * 100 + (3,)), ""),
        (chunked((7,), np.zeros(3), np.zeros(3)), "its arrays must have the size that their shape says, got 6 values"),
        (chunked((6,), np.zeros(3), np.zeros(3, np.int32)), "the pieces of an array must be flat arrays of one dtype"),
        (chunked((6,), np.zeros((2, 3))), "the pieces of an array must be flat arrays of one dtype"),
        (chunked((0,)), "the pieces of an array must be flat arrays of one dtype"),
        (chunked((3,), np.zeros(3)) | {"chunks": {"1": array()}}, "must be numbered from 0"),
        (chunked((3,), np.zeros(3)) | {"shape": [3]}, "must be numbered from 0"),
        ({"__msgpack_chunked_array__": True}, "must be numbered from 0"),
        ({b"name": 1}, "its names must be text, got b'name'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(value, message, tmp_path):
    path = packed(tmp_path / "state", {"params": {"a": value}})
    with pytest.raises(ValueError) as caught:
        released.read_flax(path)
    assert str(caught.value).startswith(f"{path}: {RULE}{message}" if "numbered" not in message else f"{path}: {RULE}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\x80\x04\x95",
        msgpack.packb([1, 2]),
        msgpack.packb(extension(np.zeros(3))),
        msgpack.packb(chunked((3,), np.zeros(3))),
        b"\xdf\xff\xff\xff\xff\xa1a\x01",  # a map of 2**32 - 1
        b"\x82\xa1a\x01\xa1a\x02",  # {"a": 1, "a": 2}
        b"\x81\xa1a" + b"\x81\xa1a" * 100_000 + b"\x01",
        b"\x81\xa1a" + b"\x91" * 100_000 + b"\x01",
        b"\x81\xa1a" + b"\xc9\xff\xff\xff\xff\x01",  # an extension of 2**32 - 1 bytes
        b"\x81\xa1a" + b"\xdb\xff\xff\xff\xfftext",
    ],
)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'state'}: {RULE}."):
        released.read_flax(tmp_path / "state")


@pytest.mark.parametrize(
    "content",
    [b"\x81\xa1a\xdd\xff\xff\xff\xff", b"\x81\xa1a\xdf\xff\xff\xff\xff"],
    ids=["list", "map"],
)
def test_a_file_that_promises_too_much_is_refused_before_room_is_made(content, tmp_path):
    (tmp_path / "state").write_bytes(content + b"\xa1a\x01")
    with pytest.raises(ValueError, match="4294967295 exceeds max"):
        released.read_flax(tmp_path / "state")


def test_a_deep_tree_is_refused(tmp_path):
    # As deep as msgpack in C takes, and deeper than functions of Python may call each other.
    (tmp_path / "state").write_bytes(b"\x81\xa1a" + b"\x81\xa1b" * 1000 + b"\x01")
    with pytest.raises(ValueError, match=r"state: (a/b/b/.* must be an array, got int|must be a file of flax)"):
        released.measure_dit(released.read_flax(tmp_path / "state"), tmp_path / "state")


def test_any_changed_byte_is_read_or_refused(tmp_path):
    path = write_flax(tmp_path / "state", {"a": {"b": ARRAYS["matrix"], "c": chunked((2,), np.zeros(2))}, "d": 300})
    content, random = bytearray(path.read_bytes()), np.random.default_rng(0)
    refused = 0
    for place in range(len(content)):
        for value in random.integers(0, 256, 6):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                released.read_flax(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
    assert refused > len(content)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        released.read_flax(tmp_path / "nowhere")


# Folders that flax writes through Orbax


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As `flax.training.checkpoints.save_checkpoint` makes it, with parameters from a device."""
    orbax = pytest.importorskip("orbax.checkpoint")
    path = tmp_path_factory.mktemp("orbax") / "checkpoint_7"
    on_device = {"a": jnp.full((2, 3), 1.5, jnp.bfloat16), "b": jnp.arange(3.0)}
    state = {"step": 7, "params": {"net": on_device}, "ema_params": {"250": nested(flax_tensors())}}
    orbax.PyTreeCheckpointer().save(path, state)
    return path


def test_part_of_a_folder_is_read_to_the_last_bit(folder):
    assert_same(released.read_flax(folder, "ema_params"), {"250": nested(flax_tensors())})
    held = {"a": np.full((2, 3), 1.5, np.float32), "b": np.arange(3, dtype=np.float32)}
    assert_same(released.read_flax(folder, "params"), {"net": held})
    assert released.read_flax(folder).keys() == {"step", "params", "ema_params"}


def test_folders_that_cannot_be_read_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match="must hold a dictionary named ema, got ema_params, params, step"):
        released.read_flax(folder, "ema")
    rule = "must be a folder that Orbax wrote, such as checkpoint_800640, got one with checkpoint_7"
    with pytest.raises(ValueError, match=rule):
        released.read_flax(folder.parent, "params")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "manifest.ocdbt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="copy: must be a folder that Orbax wrote, but it cannot be read"):
        released.read_flax(copy, "params")
    os.mkfifo(copy / "pipe")
    with pytest.raises(ValueError, match=r"copy: must contain ordinary files only, got .*pipe"):
        released.read_flax(copy, "params")


# Optional packages


def test_without_msgpack_it_is_named(tmp_path, monkeypatch):
    path = write_flax(tmp_path / "state", {"a": {}})
    for name in [*(name for name in sys.modules if name.partition(".")[0] == "msgpack"), "msgpack"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match="msgpack is not installed: pip install msgpack"):
        released.read_flax(path)
