"""JSON from untrusted sources, read within limits on its size, number of values and depth."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ._files import read_regular

_MAX_BYTES = 1 << 26
_MAX_VALUES = 1 << 20
_MAX_DEPTH = 64


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in an ordinary file, within the limits of `parse_json`.

    **Raises:** `OSError` if the file cannot be opened; `ValueError` that names the file if it is a pipe or the like, or
    does not contain a JSON object within the limits.
    """
    content = read_regular(path, _MAX_BYTES)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, but it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be an object, got {type(value).__name__}")
    return value


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text in UTF-8.

    The text has at most 64 MiB and about a million values (every comma and opening bracket is counted as one, also in
    strings), nested at most 64 times. So parsing takes at most some seconds and some hundred MB for any content.

    **Arguments:** `content`; `finite` whether all numbers must be finite.

    **Raises:** `ValueError` with the reason.
    """
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, more than {_MAX_BYTES:,}")
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ValueError(f"it has more than {_MAX_VALUES:,} values")
    hooks: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(content.decode(), **hooks)
    except RecursionError:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} times") from None
    _check_depth(value)
    return value


def readable_json(name: str, value: Any, *, finite: bool = True) -> str:
    """The text of a value which `parse_json` reads again.

    **Arguments:** `name` of the value, for errors; `value` of any types that JSON can hold; `finite` as for
    `parse_json`.

    **Raises:** `ValueError` that names the value if JSON cannot hold it, or if its text is beyond the limits of
    `parse_json`.
    """
    rule = f"{name} must be JSON that can be read again"
    try:
        text = json.dumps(value)
        parse_json(text.encode(), finite=finite)
    except RecursionError:
        raise ValueError(f"{rule}, but it is nested more than {_MAX_DEPTH} times") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}, but {error}") from error
    return text


def _check_depth(value: Any) -> None:
    values = [value]
    for _ in range(_MAX_DEPTH):
        containers = [value for value in values if isinstance(value, list | dict)]
        values = [inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)]
    if any(isinstance(value, list | dict) for value in values):
        raise ValueError(f"it is nested more than {_MAX_DEPTH} times")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"its numbers must be finite, got {constant}")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        _refuse(text[:40])
    return number
