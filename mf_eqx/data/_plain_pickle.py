"""Pickled dictionaries of numbers, text, bytes and byte arrays, such as the Python version of CIFAR-10.

A pickle is a program for a small stack machine, and an ordinary reader lets it call any function. Here the standard
library's reader in Python runs it with two tables cut short: of instructions, only those that make plain values are
left; of names, only the few by which NumPy marks an array of bytes, and these stand for the functions below. Nothing is
imported. (Its reader in C has no table of instructions that could be cut.)
"""

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

_INSTRUCTIONS = {
    *("PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}
_CODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_MOST_STEPS = 1_000_000
"""Bounds the time. A batch of CIFAR-10 has some 50,000."""
_MOST_COPIES = 2
"""Bounds the memory: bytes that are made of text, for each byte of the file. CIFAR-10 needs one."""
_LONGEST_SHOWN = 60
_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError),
    *(struct.error, pickle.PickleError),
)


class _Refused(ValueError):
    """A pickle that holds something else; the message goes on after the file's name."""


def read_plain_pickle(name: str, content: bytes, what: str) -> dict[str, Any]:
    """The dictionary that a pickle holds, of numbers, text, bytes, lists, tuples, dictionaries and uint8 arrays.

    Arrays are expected as values of the dictionary itself, not deeper.

    **Arguments:** `name` of the file, in front of messages; `content`; `what` the file should be, for messages.

    **Raises:** `ValueError` if it is no whole pickle of protocol 2 or later, or holds anything else: a name that is not
    NumPy's mark of an array is reported, and never imported. Likewise if it would become many times as large in memory.
    """
    try:
        values = _Unpickler(content, what).load()
        if not isinstance(values, dict):
            raise _Refused(f"must be a pickled dictionary of {what}, got {type(values).__name__}")
        return {key: _plain(value, what) for key, value in values.items()}
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except _ERRORS as error:
        raise ValueError(f"{name}: must be a whole pickle of {what}, got damaged instructions: {error}") from error


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, _Function | _ByteDtype):
        raise _Refused(f"must hold plain values alone, got a name, which is no part of {what}")
    return value.value if isinstance(value, _Array) else value


class _Function:
    """What stands for a function of NumPy: it can be called, and nothing can be set in it."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise TypeError("state is set of what is no array")


class _ByteDtype:
    """What stands for the dtype uint8."""

    def __setstate__(self, state: Any) -> None:
        """Its byte order, which says nothing of bytes."""


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
            raise _Refused("must hold arrays of uint8 in C order, got another")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 8:
            raise TypeError("the shape of an array must be a tuple of at most 8 sizes")
        # Python 2 has text for bytes, in which each character is a byte.
        values = self._encode(data) if isinstance(data, str) else data
        if not isinstance(values, bytes | bytearray) or len(values) != math.prod(shape):
            held = f"{len(values):,}" if isinstance(values, bytes | bytearray) else type(values).__name__
            raise _Refused(f"must hold {math.prod(shape):,} bytes for an array of shape {shape}, got {held}")
        self.value = np.frombuffer(values, np.uint8).reshape(shape)


class _Dispatch(dict[int, Callable[[Any], None]]):
    """The functions of the permitted instructions, by their code. It counts how often it is asked."""

    def __init__(self, what: str):
        functions = pickle._Unpickler.dispatch
        self.update({code: functions[code] for code, name in _CODES.items() if name in _INSTRUCTIONS})
        self.update({pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.BYTEARRAY8[0]: _push_bytes})
        self._what, self._steps = what, 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise _Refused(f"must hold at most {_MOST_STEPS:,} instructions, got more")
        if (function := self.get(code)) is not None:
            return function
        name = _CODES.get(code, f"of code {code}")
        raise _Refused(f"must hold plain values alone, got the instruction {name}, which is no part of {self._what}")


class _Unpickler(pickle._Unpickler):
    """Runs permitted instructions; names stand for methods of its own."""

    def __init__(self, content: bytes, what: str):
        pickle._Unpickler.__init__(self, io.BytesIO(content), encoding="latin-1")
        vars(self)["dispatch"] = _Dispatch(what)  # in place of the class's own
        self._what, self._bytes_left = what, _MOST_COPIES * len(content)
        self._names: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): _Function(self._dtype),
            ("_codecs", "encode"): _Function(self._encode),  # Python 3 writes bytes so in protocol 2
        }
        for core in ("numpy.core", "numpy._core"):
            self._names[f"{core}.multiarray", "_reconstruct"] = _Function(lambda *_: _Array(self._encode))
            self._names[f"{core}.numeric", "_frombuffer"] = _Function(self._whole_array)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            shown = f"{module[:_LONGEST_SHOWN]}.{name[:_LONGEST_SHOWN]}"[:_LONGEST_SHOWN]
            raise _Refused(f"must hold plain values alone, but names {shown}, which is no part of {self._what}")
        return self._names[module, name]

    def _encode(self, text: Any, encoding: Any = "latin-1") -> bytes:
        """Text in which each character is a byte; a call that takes three bytes in the file may copy all others."""
        if encoding not in ("latin1", "latin-1"):
            raise TypeError("bytes are encoded otherwise than by Latin-1")
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise _Refused(f"must unpack to few times its size, got more, which is no part of {self._what}")
        return text.encode("latin-1")

    def _dtype(self, code: Any, *_: Any) -> _ByteDtype:
        if code != "u1":
            shown = repr(code[:_LONGEST_SHOWN]) if isinstance(code, str) else type(code).__name__
            raise _Refused(f"must hold arrays of uint8, got dtype {shown}")
        return _ByteDtype()

    def _whole_array(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        array = _Array(self._encode)
        array.fill(data, dtype, shape, order != "C")
        return array


def _set_item(reader: Any) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    _set(reader.stack[-1], key, value)


def _set_items(reader: Any) -> None:
    items = reader.pop_mark()
    for key, value in zip(items[::2], items[1::2], strict=True):
        _set(reader.stack[-1], key, value)


def _set(target: Any, key: Any, value: Any) -> None:
    # Keys are text alone: to hash nested tuples takes time and stack without bound.
    if not isinstance(target, dict) or not isinstance(key, str | bytes):
        raise TypeError(f"keys must be text, got {type(key).__name__}")
    target[key.decode("latin-1") if isinstance(key, bytes) else key] = value


def _push_bytes(reader: Any) -> None:
    """The library's own function would make room for as many bytes as are announced."""
    size = int.from_bytes(reader.read(8), "little")
    content = reader.read(size)
    if len(content) < size:
        raise EOFError(f"{size:,} bytes are announced, got {len(content):,}")
    reader.append(bytearray(content))
