r"""Files that `torch.save` wrote before torch 1.6, read without torch and without running anything in them.

Such a file is a row of pickles: a magic number, a version, facts about the machine, the saved object, and the keys of
its storages. The storages follow in this order, each as its number of elements and then the elements, little-endian. A
tensor of the object is a *view* of a storage $s$,

$$x_{ijk\dots} = s_{o + i\,a + j\,b + k\,c + \dots},$$

with an offset o and strides (a, b, c, ...) that need not be those of an array in C order: weights that came from
TensorFlow are transposed views. Several tensors may share a storage.

Source: the format is that of `_legacy_save` and `_legacy_load` in torch's `serialization.py`.
"""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from ._files import open_regular, read_regular
from ._plain_pickle import Function, load_plain_pickle, LONGEST_SHOWN, Refused

_WHAT = "a torch file of tensors"
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_VERSION = 1001
_DTYPES = {
    **{"Float": ("<f4", "f4"), "Double": ("<f8", "f4"), "Half": ("<f2", "f4"), "BFloat16": (jnp.bfloat16, "f4")},
    **{"Long": ("<i8", "i8"), "Int": ("<i4", "i4"), "Short": ("<i2", "i2"), "Char": ("i1", "i1")},
    **{"Byte": ("u1", "u1"), "Bool": ("u1", "?")},
}
"""The dtypes in the file and in memory, by the names of torch's storages."""
_MOST_AXES = 8
_DEEPEST = 20
"""The largest number of levels of nested dictionaries, lists and tuples. Without this limit, a list that contains
itself would be followed without end."""
_MOST_VALUES = 1_000_000
"""Limits time and memory: a value that is stored once may be used in many places, and is counted and returned for each
of them. In a file that uses every value once, each takes at least one byte and one instruction."""


class _Kind(NamedTuple):
    """The type of a storage."""

    name: str


class _Storage(NamedTuple):
    """The elements that tensors are views of."""

    key: str
    kind: _Kind
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, whose elements follow later in the file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _State(dict[str, Any]):
    """What stands for an OrderedDict. The attributes that torch sets in it hold versions of layers and no tensor."""

    def __setstate__(self, state: Any) -> None:
        """Nothing of it is needed."""


def is_legacy_torch(path: str | Path) -> bool:
    """Whether a file begins as `torch.save` began it before torch 1.6. **Raises:** as `open_regular` does."""
    with open_regular(path) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_legacy_torch(path: str | Path) -> dict[Any, Any]:
    """The content of a file of `torch.save` from before torch 1.6: nested dictionaries, lists and tuples with tensors
    as NumPy arrays, floating point as float32. Keys are text, or integers as in the states of optimisers.

    **Raises:** `OSError` if it cannot be read; `ValueError` that names the file if it is no such file, is damaged or
    cut off, or holds anything but tensors and plain values.
    """
    content = read_regular(path)
    try:
        if not content.startswith(_MAGIC):
            raise Refused(f"must be {_WHAT} from before torch 1.6, got another beginning")
        file = io.BytesIO(content)
        file.seek(len(_MAGIC))
        tree, storages = _read_pickles(file)
        arrays = _read_storages(content, file.tell(), storages)
        return _with_arrays(tree, arrays, iter(range(min(len(content), _MOST_VALUES))))
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error.__cause__


def _read_pickles(file: io.BytesIO) -> tuple[dict[Any, Any], list[_Storage]]:
    """The saved object, and its storages in the order in which they follow."""
    if (version := load_plain_pickle(file, _WHAT, {})) != _VERSION:
        # Anything but an integer is shown by its type: nested lists of a small file could be exponentially long as
        # text.
        shown = str(version)[:LONGEST_SHOWN] if type(version) is int else type(version).__name__
        raise Refused(f"must have the version {_VERSION} of torch's format, got {shown}")
    machine = load_plain_pickle(file, _WHAT, {})
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("must be written by a little-endian machine, got another")
    found: dict[str, _Storage] = {}

    def storage(identifier: Any) -> _Storage:
        new = _storage(identifier)
        if (known := found.setdefault(new.key, new)) != new:
            raise Refused(f"must have one type and size for each storage, got {known[1:]} and {new[1:]}")
        return new

    tree = load_plain_pickle(file, _WHAT, _names(), storage, ("BINPERSID", "BINFLOAT"))
    keys = load_plain_pickle(file, _WHAT, {})
    if not isinstance(tree, dict):
        raise Refused(f"must hold a dictionary, got {type(tree).__name__}")
    if not isinstance(keys, list) or len(keys) != len(found) or not all(isinstance(key, str) for key in keys):
        raise Refused("must list each storage of its tensors once, got another list")
    if set(keys) != found.keys():
        raise Refused("must list each storage of its tensors once, got others")
    return tree, [found[key] for key in keys]


def _names() -> dict[tuple[str, str], Any]:
    """What stands for the names in such a file."""
    return {
        ("collections", "OrderedDict"): Function(lambda: _State()),
        ("torch._utils", "_rebuild_tensor"): Function(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
        ("torch._utils", "_rebuild_parameter"): Function(lambda tensor, *_: tensor),
        **{("torch", f"{name}Storage"): _Kind(name) for name in _DTYPES},
    }


def _storage(identifier: Any) -> _Storage:
    if not isinstance(identifier, tuple) or len(identifier) != 6:
        raise TypeError("a storage must be identified by six values")
    word, kind, key, _, count, view = identifier
    if word != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str) or not _is_size(count):
        raise TypeError("a storage must be identified by its type, key, place and size")
    if view is not None:
        raise Refused("must hold whole storages, got a view of one")
    return _Storage(key, kind, count)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """A view that lies within its storage, and is not larger."""
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError("a tensor must be made of a storage, an offset, a shape and strides")
    if not len(shape) == len(strides) <= _MOST_AXES:  # before their values are looked at, which could be a million
        raise TypeError(f"a tensor must have at most {_MOST_AXES} axes, with a stride each")
    if not all(map(_is_size, (offset, *shape, *strides))) or not _is_size(math.prod(size or 1 for size in shape)):
        raise TypeError("a tensor must have an offset, a shape and strides of possible sizes")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= storage.size or math.prod(shape) > storage.size):
        of = f"of shape {shape}, strides {strides} and offset {offset}"
        raise Refused(f"must hold tensors that lie within their storage of {storage.size:,} elements, got one {of}")
    return _Tensor(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 58  # with room for the bytes of an element


def _read_storages(content: bytes, start: int, storages: list[_Storage]) -> dict[str, Shaped[np.ndarray, " _"]]:
    arrays = {}
    for storage in storages:
        stored, wanted = _DTYPES[storage.kind.name]
        count, start = int.from_bytes(content[start : start + 8], "little"), start + 8
        end = start + storage.size * np.dtype(stored).itemsize
        if count != storage.size:
            raise Refused(f"must hold {storage.size:,} elements of a storage, got {count:,}")
        if end > len(content):
            raise Refused(f"must hold {end - start:,} bytes of a storage, got {len(content) - start:,}")
        with np.errstate(over="ignore"):
            arrays[storage.key] = np.frombuffer(content, stored, count, start).astype(wanted)
        start = end
    if start != len(content):
        raise Refused(f"must end after its last storage, got {len(content) - start:,} bytes more")
    return arrays


def _with_arrays(value: Any, arrays: dict[str, Shaped[np.ndarray, " _"]], places: Iterator[int], depth: int = 0) -> Any:
    """The value with arrays for its tensors. `places` has an item for each place that may still hold a value."""
    if next(places, None) is None:
        raise Refused(f"must hold at most one value for each of its bytes, and {_MOST_VALUES:,} in all, got more")
    if depth > _DEEPEST:
        raise Refused(f"must hold at most {_DEEPEST} levels of dictionaries, lists and tuples, got more")
    if isinstance(value, _Tensor):
        array = arrays[value.storage.key][value.offset :]
        strides = tuple(stride * array.itemsize for stride in value.strides)
        return np.lib.stride_tricks.as_strided(array, value.shape, strides, writeable=False)
    if isinstance(value, Function | _Kind | _Storage):
        raise Refused("must hold tensors and plain values alone, got what tensors are made of")
    if isinstance(value, dict):
        return {name: _with_arrays(inner, arrays, places, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_arrays(inner, arrays, places, depth + 1) for inner in value)
    return value
