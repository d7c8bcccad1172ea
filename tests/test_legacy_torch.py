"""Files of torch before 1.6, written here by hand: views are read as views, and other files are refused.

The writer knows the format from torch's sources; where torch is installed, its own files are read, too.
"""

import os
import struct
import sys
import tracemalloc
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from mf_eqx._foreign import read_torch
from mf_eqx._legacy_torch import is_legacy_torch, read_legacy_torch


class Name(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Name
    arguments: tuple


class Identified(NamedTuple):
    """What a persistent identifier stands for."""

    by: tuple


def coded(value):
    """A value as instructions of a pickle."""
    match value:
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return coded(function) + coded(arguments) + b"R"
        case Identified(by):
            return coded(by) + b"Q"
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value)) + value.encode()
        case tuple():
            return b"(" + b"".join(map(coded, value)) + b"t"
        case list():
            return b"](" + b"".join(map(coded, value)) + b"e"
        case dict():
            return b"}(" + b"".join(coded(key) + coded(inner) for key, inner in value.items()) + b"u"
    raise TypeError(value)


def pickled(value):
    return b"\x80\x02" + (value if isinstance(value, bytes) else coded(value)) + b"."


def storage(key, size, kind="Float", view=None):
    return Identified(("storage", Name("torch", f"{kind}Storage"), key, "cpu", size, view))


def tensor(held, offset, shape, strides):
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (held, offset, shape, strides, False, {}))


def file(tree, storages, *, version=1001, machine=None, keys=None, counts=None):
    """The bytes of a file of a value, or of its instructions, and of arrays for its storages."""
    machine = {"protocol_version": 1001, "little_endian": True} if machine is None else machine
    parts = [0x1950A86A20F9469CFC6C, version, machine, tree, [*storages] if keys is None else keys]
    counts = [array.size for array in storages.values()] if counts is None else counts
    held = [struct.pack("<q", n) + array.tobytes() for n, array in zip(counts, storages.values(), strict=True)]
    return b"".join([*map(pickled, parts), *held])


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "old.pth").write_bytes(content)
        return tmp_path / "old.pth"

    return write


VALUES = np.arange(24, dtype=np.float32)
VIEW = tensor(storage("7", 24), 0, (2, 3, 4), (1, 2, 6))


def doubled(levels):
    """A list that holds another one twice, which holds another one twice, and so on."""
    return b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(levels))


SHARED = b"}(" + coded("a") + coded({"w": VIEW}) + b"q\0" + coded("b") + b"h\0u"
SMALL = file({"a": VIEW, "b": tensor(storage("8", 2, "Long"), 1, (), ())}, {"7": VALUES, "8": np.arange(2)})


def test_strided_view_is_read_by_its_strides(write):
    found = read_legacy_torch(write(file({"a": VIEW}, {"7": VALUES})))["a"]
    np.testing.assert_array_equal(found, VALUES.reshape(4, 3, 2).transpose(2, 1, 0))
    assert found[0, 1, 0] == 2  # in C order it would be 4


def test_tensors_that_share_a_storage_begin_at_their_offsets(write):
    held = storage("7", 24)
    tree = {"a": tensor(held, 3, (2, 2), (10, 1)), "b": tensor(held, 23, (1,), (5,)), "c": tensor(held, 2, (), ())}
    found = read_legacy_torch(write(file(tree, {"7": VALUES})))
    np.testing.assert_array_equal(found["a"], [[3, 4], [13, 14]])
    np.testing.assert_array_equal(found["b"], [23])
    assert found["c"].shape == () and found["c"] == 2


def test_empty_tensors_are_empty(write):
    tree = {"a": tensor(storage("0", 0), 0, (0,), (1,)), "b": tensor(storage("7", 24), 24, (3, 0), (1 << 57, 1))}
    found = read_legacy_torch(write(file(tree, {"7": VALUES, "0": VALUES[:0]})))
    assert found["a"].shape == (0,) and found["b"].shape == (3, 0)


KINDS = {
    **{"Float": ("<f4", "f4"), "Double": ("<f8", "f4"), "Half": ("<f2", "f4"), "BFloat16": (jnp.bfloat16, "f4")},
    **{"Long": ("<i8", "i8"), "Int": ("<i4", "i4"), "Short": ("<i2", "i2"), "Char": ("i1", "i1"), "Byte": ("u1", "u1")},
    "Bool": ("?", "?"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_with_its_values(kind, write):
    stored, wanted = KINDS[kind]
    values = np.array([0, 1, 100]).astype(stored)
    tree = {"a": tensor(storage("1", 3, kind), 1, (2,), (1,))}
    found = read_legacy_torch(write(file(tree, {"1": values})))["a"]
    np.testing.assert_array_equal(found, values[1:].astype(wanted))
    assert found.dtype == np.dtype(wanted)


def test_dictionaries_are_nested_and_plain_values_stay(write):
    ordered = coded(Call(Name("collections", "OrderedDict"), ()))
    state = ordered + b"(" + coded("w") + coded(VIEW) + b"u" + coded({"_metadata": {"": {"version": 1}}}) + b"b"
    tree = b"}(" + coded("epoch") + coded(3) + coded("loss") + coded(0.5) + coded("state_dict") + state + b"u"
    found = read_legacy_torch(write(file(tree, {"7": VALUES})))
    assert (found["epoch"], found["loss"], found["state_dict"].keys()) == (3, 0.5, {"w"})
    assert found["state_dict"]["w"].shape == (2, 3, 4)


def test_tensors_are_read_within_lists_and_tuples_and_under_integers(write):
    # As in the state of an optimiser.
    tree = {"state": {0: {"step": 3, "mean": VIEW}}, "groups": [{"params": [0], "betas": (0.9, VIEW)}]}
    found = read_legacy_torch(write(file(tree, {"7": VALUES})))
    for array in (found["state"][0]["mean"], found["groups"][0]["betas"][1]):
        np.testing.assert_array_equal(array, VALUES.reshape(4, 3, 2).transpose(2, 1, 0))
    assert (found["state"][0]["step"], found["groups"][0]["params"]) == (3, [0])


def test_a_dictionary_under_two_names_is_read_under_both(write):
    found = read_legacy_torch(write(file(SHARED, {"7": VALUES})))
    assert found.keys() == {"a", "b"}
    np.testing.assert_array_equal(found["a"]["w"], found["b"]["w"])


def test_small_file_with_a_value_in_many_places_is_refused(write):
    with pytest.raises(ValueError, match=r"old\.pth: must hold at most one value for each of its bytes"):
        read_legacy_torch(write(file(doubled(15) + b"}" + coded("a") + b"h\x0fs", {})))


def test_it_is_read_without_torch(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = write(SMALL)
    assert is_legacy_torch(path) and read_torch(path)["b"] == 1


def view(offset, shape, strides, size=24):
    return {"a": tensor(storage("7", size), offset, shape, strides)}


GOOD = {"7": VALUES}
WITHIN = r"must hold tensors that lie within their storage of 24 elements, got one of shape "
RUN = Call(Name("os", "system"), ("exit 1",))
NESTED = b"}" + coded("a") + b"}" + (coded("a") + b"}") * 30 + b"s" * 31


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file(view(0, (25,), (1,)), GOOD), WITHIN + r"\(25,\)"),
        (file(view(1, (2, 12), (12, 1)), GOOD), WITHIN + r"\(2, 12\), strides \(12, 1\) and offset 1"),
        (file(view(24, (), ()), GOOD), WITHIN),
        (file(view(0, (5, 5), (0, 1)), GOOD), WITHIN),
        (file(view(0, (1 << 50,), (0,)), GOOD), WITHIN),
        (file(view(-1, (2,), (1,)), GOOD), "an offset, a shape and strides of possible sizes"),
        (file(view(0, (2,), (-1,)), GOOD), "an offset, a shape and strides of possible sizes"),
        (file(view(0, (2, 2), (1,)), GOOD), "at most 8 axes, with a stride each"),
        (file(view(0, (0, 1 << 40, 1 << 40), (1, 1, 1)), GOOD), "a shape and strides of possible sizes"),
        (file(view(0, (1,), (1 << 62,)), GOOD), "an offset, a shape and strides of possible sizes"),
        (file(view(0, 9 * (1,), 9 * (1,)), GOOD), "at most 8 axes, with a stride each"),
        (file(view(0, [2], (1,)), GOOD), "must be made of a storage, an offset, a shape and strides"),
        (file({"a": tensor(3, 0, (2,), (1,))}, {}), "must be made of a storage"),
        (file({"a": tensor(storage("7", 24, view=("9", 0, 2)), 0, (2,), (1,))}, GOOD), "whole storages, got a view"),
        (file({"a": Identified(("module", "x"))}, {}), "a storage must be identified by six values"),
        (file({"a": VIEW, "b": tensor(storage("7", 12), 0, (1,), (1,))}, GOOD), "one type and size for each storage"),
        (file({"a": VIEW, "b": tensor(storage("7", 24, "Int"), 0, (1,), (1,))}, GOOD), "one type and size for each"),
        (file({"a": storage("7", 24)}, GOOD), "must hold tensors and plain values alone"),
        (file({"a": [(storage("7", 24),)]}, GOOD), "must hold tensors and plain values alone"),
        (file({"a": Name("torch", "FloatStorage")}, {}), "must hold tensors and plain values alone"),
        (
            file({"a": RUN}, {}),
            r"plain values alone, but names os\.system, which is no part of a torch file",
        ),
        (file({"a": Call(Name("torch._utils", "_rebuild_qtensor"), ())}, {}), r"names torch\._utils\._rebuild_qtensor"),
        (file([VIEW], GOOD), "must hold a dictionary, got list"),
        (file({True: VIEW}, GOOD), r"keys must be text or integers below 2\^32, got bool"),
        (file({1 << 32: VIEW}, GOOD), r"keys must be text or integers below 2\^32, got int"),
        (file(b"}q\x01" + coded("a") + b"h\x01s", {}), "at most 20 levels of dictionaries, lists and tuples"),
        (file(NESTED, {}), "at most 20 levels of dictionaries, lists and tuples"),
        (file(doubled(20) + b"}" + coded("a") + b"h\x14s", {}), "at most 20 levels of dictionaries, lists and tuples"),
        (file({"a": VIEW}, GOOD, version=1002), "must have the version 1001 of torch's format, got 1002"),
        (file({"a": VIEW}, GOOD, version=doubled(20)), "must have the version 1001 of torch's format, got list$"),
        (file({"a": VIEW}, GOOD, machine={"little_endian": False}), "must be written by a little-endian machine"),
        (file({"a": VIEW}, GOOD, machine=[]), "must be written by a little-endian machine"),
        (file({"a": VIEW}, {}), "must list each storage of its tensors once"),
        (file({"a": VIEW}, GOOD, keys=["7", "7"]), "must list each storage of its tensors once"),
        (file({"a": VIEW}, GOOD, keys=[7]), "must list each storage of its tensors once"),
        (file({"a": VIEW}, GOOD, counts=[23]), "must hold 24 elements of a storage, got 23$"),
        (file({"a": VIEW}, {"7": VALUES[:20]}, counts=[24]), "must hold 96 bytes of a storage, got 80$"),
        (SMALL + b"\0", "must end after its last storage, got 1 bytes more"),
        (b"PK\3\4 and more", r"from before torch 1\.6, got another beginning"),
        (b"", r"from before torch 1\.6, got another beginning"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(content, message, write):
    with pytest.raises(ValueError, match=r"old\.pth: .*" + message):
        read_legacy_torch(write(content))


def test_a_file_that_is_cut_anywhere_is_refused(write):
    for length in range(len(SMALL)):
        with pytest.raises(ValueError, match=r"old\.pth: must "):
            read_legacy_torch(write(SMALL[:length]))


@pytest.mark.parametrize("bits", [1, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (0x10, 0x80, 0xFF))])
def test_a_file_with_any_flipped_byte_is_read_or_refused(bits, write):
    read = 0
    for place in range(len(SMALL)):
        try:
            assert isinstance(
                read_legacy_torch(write(SMALL[:place] + bytes([SMALL[place] ^ bits]) + SMALL[place + 1 :])), dict
            )
            read += 1
        except ValueError as error:
            assert "old.pth: must " in str(error)
    assert 24 * 4 <= read < len(SMALL) / 2  # values of tensors may be any


def test_sizes_that_a_file_announces_take_no_memory(write):
    path = write(file(view(0, (1 << 40,), (1,), size=1 << 40), GOOD, counts=[1 << 40]))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"must hold 4,398,046,511,104 bytes of a storage, got 96$"):
            read_legacy_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: must be an ordinary file"):
        read_torch(tmp_path / "pipe")


@pytest.mark.parity
def test_files_of_torch_are_read_as_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {"base": base, "turned": base.permute(2, 0, 1), "part": base[1:, ::2, 3], "one": torch.tensor(7)}
    tensors |= {"learnt": torch.nn.Parameter(base[0].T), "none": torch.zeros(0, 3), "true": base > 30}
    tensors |= {str(kind): base.to(kind)[:, 1] for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int8)}
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    torch.save({"state": state, "epoch": 3, **tensors}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_torch(tmp_path / "old.pth")
    assert found["epoch"] == 3 and found["state"].keys() == state.keys()
    for name, value in [*tensors.items(), *state.items()]:
        ours = found[name] if name in found else found["state"][name]
        value = value.detach()
        np.testing.assert_array_equal(ours, (value.float() if value.is_floating_point() else value).numpy())
        assert ours.dtype == (np.float32 if value.is_floating_point() else value.numpy().dtype)
