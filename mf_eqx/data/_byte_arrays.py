"""Pickled dictionaries of numbers, text, bytes and byte arrays, such as the Python version of CIFAR-10.

Each of the few names in a pickled NumPy array of bytes is replaced by an object defined below; so the file cannot call
any function of NumPy.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from .._plain_pickle import Function, load_plain_pickle, LONGEST_SHOWN, Refused

_MOST_COPIES = 2
"""Limits the memory: the largest number of bytes that are encoded from text, for each byte of the file. CIFAR-10 needs
one."""


def read_plain_pickle(name: str, content: bytes, what: str) -> dict[str, Any]:
    """The dictionary that a pickle holds, of numbers, text, bytes, lists, tuples, dictionaries and uint8 arrays.

    Arrays are expected as values of the dictionary itself, not deeper.

    **Arguments:** `name` of the file, in front of messages; `content`; `what` the file should be, for messages.

    **Raises:** `ValueError` if it is no whole pickle of protocol 2 or later, or holds anything else: a name that is not
    NumPy's mark of an array is reported, and never imported. Likewise if it would become many times as large in memory.
    """
    try:
        values = load_plain_pickle(io.BytesIO(content), what, _numpy_names(_Encoder(what, len(content))))
        if not isinstance(values, dict):
            raise Refused(f"must be a pickled dictionary of {what}, got {type(values).__name__}")
        return {key: _plain(value, what) for key, value in values.items()}
    except Refused as error:
        raise ValueError(f"{name}: {error}") from error.__cause__


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, Function | _ByteDtype):
        raise Refused(f"must hold plain values alone, got a name, which is no part of {what}")
    return value.value if isinstance(value, _Array) else value


class _ByteDtype:
    """What stands for the dtype uint8."""

    def __setstate__(self, state: Any) -> None:
        """Nothing is set: the state is the byte order, which has no meaning for single bytes."""


class _Array:
    """A byte array: NumPy makes an empty one, and then sets what it holds."""

    def __init__(self, encode: Callable[[str], bytes]):
        self._encode = encode
        self.value: UInt8[np.ndarray, "..."] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, data = state
        self.fill(data, dtype, shape, columns_first)

    def fill(self, data: Any, dtype: Any, shape: Any, columns_first: Any) -> None:
        if not isinstance(dtype, _ByteDtype) or columns_first:
            raise Refused("must hold arrays of uint8 in C order, got another")
        # Bounds the time, and the length of the messages below.
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(map(_is_size, shape)):
            raise TypeError("the shape of an array must be a tuple of at most 8 sizes below 2^32")
        # Python 2 has text for bytes, in which each character is a byte.
        values = self._encode(data) if isinstance(data, str) else data
        if not isinstance(values, bytes | bytearray) or len(values) != math.prod(shape):
            held = f"{len(values):,}" if isinstance(values, bytes | bytearray) else type(values).__name__
            raise Refused(f"must hold {math.prod(shape):,} bytes for an array of shape {shape}, got {held}")
        self.value = np.frombuffer(values, np.uint8).reshape(shape)


class _Encoder:
    """Encodes text as bytes, up to a total that is proportional to the size of the file."""

    def __init__(self, what: str, size: int):
        self._what, self._bytes_left = what, _MOST_COPIES * size

    def __call__(self, text: Any, encoding: Any = "latin-1") -> bytes:
        """The bytes of a text in which each character is one byte. Their total is limited, because a call that takes
        only three bytes of the file may copy all the others."""
        if encoding not in ("latin1", "latin-1"):
            raise TypeError("bytes are encoded otherwise than by Latin-1")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise Refused(f"must unpack to a small multiple of its size, got more, which is no part of {self._what}")
        return text.encode("latin-1")


def _numpy_names(encode: _Encoder) -> dict[tuple[str, str], Any]:
    def whole_array(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        array = _Array(encode)
        array.fill(data, dtype, shape, order != "C")
        return array

    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): Function(_dtype),
        ("_codecs", "encode"): Function(encode),  # Python 3 writes bytes so in protocol 2
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray", "_reconstruct"] = Function(lambda *_: _Array(encode))
        names[f"{core}.numeric", "_frombuffer"] = Function(whole_array)
    return names


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _dtype(code: Any, *_: Any) -> _ByteDtype:
    if code != "u1":
        shown = repr(code[:LONGEST_SHOWN]) if isinstance(code, str) else type(code).__name__
        raise Refused(f"must hold arrays of uint8, got dtype {shown}")
    return _ByteDtype()
