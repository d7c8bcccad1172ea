"""Pickled dictionaries of numbers, text and byte arrays, read without running anything.

A pickle is a program for a small stack machine, and an ordinary reader lets it call any function. This one knows only
the instructions of plain values, and the few names by which NumPy marks an array of bytes; these are never looked up,
but stand for the code below. Everything else is refused by name.

The instructions are taken apart by `pickletools`, the standard library's disassembler, which executes none of them.
"""

import math
import pickletools
from typing import Any

import numpy as np
from jaxtyping import UInt8


class _Refused(ValueError):
    """A pickle that holds something else; the message goes on after the file's name."""


class _Array:
    """A byte array in the making: NumPy first makes an empty one, and then sets what it holds."""

    value: UInt8[np.ndarray, "..."] | None = None


class _Name:
    """A name in a pickle, such as "numpy dtype". It stands for itself: nothing is imported."""

    def __init__(self, name: str):
        self.name = name


_PUSH = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ARRAY_CLASS, _DTYPE, _ENCODE = "numpy ndarray", "numpy dtype", "_codecs encode"
_EMPTY_ARRAY = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}
_WHOLE_ARRAY = {"numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"}
_NAMES = {_ARRAY_CLASS, _DTYPE, _ENCODE} | _EMPTY_ARRAY | _WHOLE_ARRAY
_MOST_STEPS = 1_000_000
"""Bounds the time. A batch of CIFAR-10 has some 50,000."""
_MOST_COPIES = 2
"""Bounds the memory: bytes that are made of text, or text of bytes, for each byte of the file. Honest ones make one."""
_LONGEST_SHOWN = 60
_BYTE_DTYPE = object()
"""What stands for the dtype uint8."""


def read_plain_pickle(name: str, content: bytes, what: str) -> dict[str, Any]:
    """The dictionary that a pickle holds, of numbers, text, bytes, lists, tuples, dictionaries and uint8 arrays.

    **Arguments:** `name` of the file, in front of messages; `content`; `what` the file should be, for messages.

    **Raises:** `ValueError` if it is no whole pickle of protocol 2 or later, or holds anything else: a name that is not
    NumPy's mark of an array is told, and never imported. Likewise if it would become many times as large in memory.
    """
    try:
        found = _run(content, what)
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{name}: must be a whole pickle of {what}, got damaged instructions: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: must be a pickled dictionary of {what}, got {type(found).__name__}")
    return {key: value.value if isinstance(value, _Array) else value for key, value in found.items()}


def _run(content: bytes, what: str) -> Any:
    """What is on top of the stack when the program stops."""
    machine = _Machine(what, _MOST_COPIES * len(content))
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if number == _MOST_STEPS:
            raise _Refused(f"must hold at most {_MOST_STEPS:,} instructions, got more")
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise _Refused("must be a whole pickle, got no end")


class _Machine:
    """The stack, what was below the marks, and the memory of values that come again. It may make `most` bytes."""

    def __init__(self, what: str, most: int):
        self.what, self.most, self.made = what, most, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self.pop(_TUPLES[name])))
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"must hold plain values alone, got the instruction {name}, which is no part of {self.what}")

    def pop(self, number: int) -> list[Any]:
        """The topmost values, in the order in which they came."""
        if len(self.stack) < number:
            raise IndexError("too few values")
        values = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return values

    def pop_to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def push_name(self, name: str) -> None:
        if name not in _NAMES:
            shown = name[:_LONGEST_SHOWN].replace(" ", ".")
            raise _Refused(f"must hold plain values alone, but names {shown}, which is no part of {self.what}")
        self.stack.append(_Name(name))

    def encoded(self, text: str) -> bytes:
        """Text in which each character is a byte."""
        self.count(len(text))
        return text.encode("latin-1")

    def decoded(self, values: bytes) -> str:
        self.count(len(values))
        return values.decode("latin-1")

    def count(self, size: int) -> None:
        """Before `size` bytes are made; a call that takes three bytes in the file may copy all others."""
        self.made += size
        if self.made > self.most:
            raise _Refused(f"must unpack to at most {self.most:,} bytes, got more, which is no part of {self.what}")


def _mark(machine: _Machine, argument: Any) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _put(machine: _Machine, argument: int | None) -> None:
    machine.memory[len(machine.memory) if argument is None else argument] = machine.stack[-1]


def _get(machine: _Machine, argument: int) -> None:
    machine.stack.append(machine.memory[argument])


def _tuple(machine: _Machine, argument: Any) -> None:
    values = machine.pop_to_mark()
    machine.stack.append(tuple(values))


def _append(machine: _Machine, argument: Any) -> None:
    _extend(machine, machine.pop(1))


def _appends(machine: _Machine, argument: Any) -> None:
    _extend(machine, machine.pop_to_mark())


def _extend(machine: _Machine, values: list[Any]) -> None:
    if not isinstance(machine.stack[-1], list):
        raise TypeError("values are appended to what is no list")
    machine.stack[-1].extend(values)


def _set_item(machine: _Machine, argument: Any) -> None:
    _set(machine, machine.pop(2))


def _set_items(machine: _Machine, argument: Any) -> None:
    _set(machine, machine.pop_to_mark())


def _set(machine: _Machine, values: list[Any]) -> None:
    if not isinstance(machine.stack[-1], dict):
        raise TypeError("items are set in what is no dictionary")
    for key, value in zip(values[::2], values[1::2], strict=True):
        # Text alone: the hash of tuples nested a million times would overflow C's stack.
        machine.stack[-1][machine.decoded(key) if isinstance(key, bytes) else _text(key)] = value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text must be text, got {type(value).__name__}")
    return value


def _global(machine: _Machine, argument: str) -> None:
    machine.push_name(argument)


def _stack_global(machine: _Machine, argument: Any) -> None:
    module, name = map(_text, machine.pop(2))
    machine.count(len(module) + len(name))
    machine.push_name(f"{module} {name}")


def _reduce(machine: _Machine, argument: Any) -> None:
    """A call of one of the names."""
    function, arguments = machine.pop(2)
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise TypeError("what is called is no name")
    if function.name in _EMPTY_ARRAY:
        value = _Array()
    elif function.name in _WHOLE_ARRAY:
        value = _Array()
        data, dtype, shape, order = arguments
        _fill(machine, value, shape, dtype, order != "C", data)
    elif function.name == _DTYPE:
        value = _dtype(arguments[0])
    elif function.name == _ENCODE:  # Python 3 writes bytes so in protocol 2
        value = _latin_1(machine, *arguments)
    else:
        raise TypeError(f"{function.name} is called")
    machine.stack.append(value)


def _dtype(code: Any) -> object:
    if code not in ("u1", b"u1"):
        shown = repr(code[:40]) if isinstance(code, str | bytes) else type(code).__name__
        raise _Refused(f"must hold arrays of uint8, got dtype {shown}")
    return _BYTE_DTYPE


def _latin_1(machine: _Machine, text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes are encoded otherwise than by Latin-1")
    return machine.encoded(_text(text))


def _build(machine: _Machine, argument: Any) -> None:
    """The state of the object below: what an array holds. A dtype's state, its byte order, says nothing of bytes."""
    (state,) = machine.pop(1)
    target = machine.stack[-1]
    if isinstance(target, _Array):
        _, shape, dtype, columns_first, data = state
        _fill(machine, target, shape, dtype, columns_first, data)
    elif target is not _BYTE_DTYPE:
        raise TypeError("state is set of what is no array")


def _fill(machine: _Machine, array: _Array, shape: Any, dtype: Any, columns_first: Any, data: Any) -> None:
    if dtype is not _BYTE_DTYPE or columns_first:
        raise _Refused("must hold arrays of uint8 in C order, got another")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 8:
        raise TypeError("the shape of an array is none")
    # Python 2 has text for bytes, in which each character is a byte.
    values = machine.encoded(data) if isinstance(data, str) else data
    if not isinstance(values, bytes | bytearray) or len(values) != math.prod(shape):
        held = f"{len(values):,}" if isinstance(values, bytes | bytearray) else type(values).__name__
        raise _Refused(f"must hold {math.prod(shape):,} bytes for an array of shape {shape}, got {held}")
    array.value = np.frombuffer(values, np.uint8).reshape(shape)


_STEPS = {
    "MARK": _mark,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "TUPLE": _tuple,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
}
