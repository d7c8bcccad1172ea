"""The record of one step: a JSON file beside its arrays, which has a checksum of its own."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import remove
from .._json import parse_json, read_json_object, readable_json
from .._leaves import listed
from ._agreement import Damage

_FORMAT = 1


def record_text(step: int, leaves: Mapping[str, Any], digests: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """The content of the record's file.

    **Arguments:** `step`; `leaves` shape and dtype of each array by its path in the state; `digests` of the same
    arrays; `notes` any JSON values.

    **Raises:** `ValueError` if the record could not be read again, since its text is beyond the limits of JSON.
    """
    record = {"format": _FORMAT, "step": step, "leaves": leaves, "digests": digests, "notes": notes}
    name = "the record of a checkpoint, with its notes,"
    text = readable_json(name, record, finite=False)
    return readable_json(name, {"record": text, "sha256": _sha256(text)})


def write_record(path: Path, text: str) -> None:
    """Write a record to disk, in place of another one."""
    remove(path)  # if it is a link, its target must not be overwritten
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_record(path: Path, step: int) -> dict[str, Any]:
    """The record of a step.

    **Raises:** `Damage` if it cannot be read, was changed, or is of another step; `ValueError` if it has another
    format.
    """
    try:
        content = read_json_object(path)
        text, checksum = content["record"], content["sha256"]
        matches = _sha256(text) == checksum
        record = parse_json(text.encode(), finite=False) if matches else {}
    except Exception as error:
        raise Damage(f"its record cannot be read: {short_text(error)}") from error
    if not matches:
        raise Damage("its record does not match its checksum")
    _check(record)
    if record["format"] != _FORMAT:
        raise ValueError(f"{path.with_suffix('')}: format must be {_FORMAT}, got {record['format']}")
    if record["step"] != step:
        raise Damage(f"its record is of step {record['step']}")
    return record


def short_text(error: Exception) -> str:
    """An error's type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _check(record: Any) -> None:
    """Raises `Damage` if a record lacks one of its entries or has an entry of another type."""
    wanted = {"format": int, "step": int, "leaves": dict, "digests": dict, "notes": dict}
    if not isinstance(record, dict):
        raise Damage(f"its record is a {type(record).__name__}")
    if wrong := [name for name, kind in wanted.items() if type(record.get(name)) is not kind]:
        raise Damage(f"its record lacks {listed(wrong)} or has another type there")
    if record["leaves"].keys() != record["digests"].keys():
        raise Damage("its record has digests of other leaves")
    for name, leaf in record["leaves"].items():
        if type(leaf) is not list or [*map(type, leaf)] != [list, str]:
            raise Damage(f"its record has no shape and dtype of {name}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
