"""Pickles of plain values: numbers, text, bytes, lists, tuples and dictionaries, read without running what they hold.

A pickle is a program for a small stack machine, and an ordinary reader lets it call any function. Here the standard
library's reader in Python runs it with two restrictions: it executes only instructions that make plain values, and
accepts only names that the caller permits, each replaced by an object that the caller supplies. Nothing is imported.
(The library's reader in C has no table of instructions that could be cut.)
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any

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
_MOST_ARGUMENTS = 16
LONGEST_SHOWN = 60
"""Characters of a file's own text in a message."""
_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError),
    *(struct.error, pickle.PickleError),
)


class Refused(ValueError):
    """A file that holds something else; the message goes on after the file's name."""


class Function:
    """What stands for a permitted function: it can be called, and nothing can be set in it."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise TypeError("a function has no state to set")


def load_plain_pickle(
    file: io.BufferedIOBase,
    what: str,
    names: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
    more: Collection[str] = (),
) -> Any:
    """The value of the pickle at the current position of `file`, which is then moved to the end of the pickle.

    **Arguments:** `file`; `what` it should be, for messages; `names` by module and name, with what stands for each;
    `persistent` the function of a persistent identifier that returns its object; `more` instructions that are permitted
    besides those of plain values, such as BINFLOAT.

    **Raises:** `Refused` if it is no whole pickle of protocol 2 or later, or holds other instructions or names.
    """
    try:
        return _Unpickler(file, what, names, persistent, more).load()
    except Refused:
        raise
    except _ERRORS as error:
        reason = str(error) or "they end too early"
        raise Refused(f"must be a whole pickle of {what}, got damaged instructions: {reason}") from error


class _Dispatch(dict[int, Callable[[Any], None]]):
    """The functions of the permitted instructions, by their code. It counts how often it is asked."""

    def __init__(self, what: str, permitted: Collection[str]):
        functions = pickle._Unpickler.dispatch
        self.update({code: functions[code] for code, name in _CODES.items() if name in permitted})
        self.update({pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items})
        self.update({pickle.BYTEARRAY8[0]: _push_bytes, pickle.REDUCE[0]: _call})
        self._what, self._steps = what, 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise Refused(f"must hold at most {_MOST_STEPS:,} instructions, got more")
        if (function := self.get(code)) is not None:
            return function
        name = _CODES.get(code, f"of code {code}")
        raise Refused(f"must hold plain values alone, got the instruction {name}, which is no part of {self._what}")


class _Unpickler(pickle._Unpickler):
    """Runs permitted instructions; names and persistent identifiers stand for what the caller gives."""

    def __init__(
        self, file: io.BufferedIOBase, what: str, names: Mapping[tuple[str, str], Any], persistent: Any, more: Any
    ):
        pickle._Unpickler.__init__(self, file, encoding="latin-1")
        vars(self)["dispatch"] = _Dispatch(what, _INSTRUCTIONS | {*more})  # in place of the class's own
        self._what, self._names, self._persistent = what, names, persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            shown = f"{module[:LONGEST_SHOWN]}.{name[:LONGEST_SHOWN]}"[:LONGEST_SHOWN]
            raise Refused(f"must hold plain values alone, but names {shown}, which is no part of {self._what}")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise TypeError("an identifier without an object")
        return self._persistent(pid)


def _set_item(reader: Any) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    _set(reader.stack[-1], key, value)


def _set_items(reader: Any) -> None:
    items = reader.pop_mark()
    for key, value in zip(items[::2], items[1::2], strict=True):
        _set(reader.stack[-1], key, value)


def _set(target: Any, key: Any, value: Any) -> None:
    # No other keys: to hash nested tuples takes time and stack without bound, and many large integers share a hash.
    if not isinstance(target, dict) or not (isinstance(key, str | bytes) or _is_small(key)):
        raise TypeError(f"keys must be text or integers below 2^32, got {type(key).__name__}")
    target[key.decode("latin-1") if isinstance(key, bytes) else key] = value


def _is_small(key: Any) -> bool:
    return type(key) is int and abs(key) < 1 << 32


def _call(reader: Any) -> None:
    """Calls a function with a short tuple of arguments. The library's own function would also accept a text of any
    length, with its characters as the arguments."""
    arguments = reader.stack.pop()
    if type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
        raise TypeError(f"arguments must be a tuple of at most {_MOST_ARGUMENTS}")
    reader.stack[-1] = reader.stack[-1](*arguments)


def _push_bytes(reader: Any) -> None:
    """Reads a bytearray. The library's own function would first allocate as many bytes as the file announces."""
    size = int.from_bytes(reader.read(8), "little")
    content = reader.read(size)
    if len(content) < size:
        raise EOFError(f"{size:,} bytes are announced, got {len(content):,}")
    reader.append(bytearray(content))
