"""JSON that others may have written, read within bounds of size, number of values and depth."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ._files import read_regular

_MOST_BYTES = 1 << 26
_MOST_VALUES = 1 << 20
_MOST_DEPTH = 64


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in an ordinary file of JSON, within the bounds of `parse_json`.

    **Raises:** `OSError` if it cannot be opened; `ValueError` that names the file if it is a pipe or the like, no such
    JSON, or no object.
    """
    content = read_regular(path, _MOST_BYTES)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, but it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be an object, got {type(value).__name__}")
    return value


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """The value that JSON text in UTF-8 says.

    At most 64 MiB, about a million values (every comma and opening bracket is counted as one, also in strings), nested
    at most 64 times; so it takes some seconds and some hundred MB at most, whatever it says.

    **Arguments:** `content`; `finite` whether all numbers must be finite.

    **Raises:** `ValueError` with the reason.
    """
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, more than {_MOST_BYTES:,}")
    if sum(map(content.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values")
    hooks: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(content.decode(), **hooks)
    except RecursionError:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} times") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    held = [value]
    for _ in range(_MOST_DEPTH):
        nested = [one for one in held if isinstance(one, list | dict)]
        held = [inner for one in nested for inner in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, list | dict) for one in held):
        raise ValueError(f"it is nested more than {_MOST_DEPTH} times")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"its numbers must be finite, got {constant}")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        _refuse(text[:40])
    return number
