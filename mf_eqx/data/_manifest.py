"""The manifest of a folder of shards: a JSON file that describes all other files and has a digest of its own.

A manifest is not trusted: the type and range of every field are checked, and the name of every file must be that of
`name_of_file`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .._json import read_json_object
from . import _structure

MANIFEST = "manifest.json"
VERSION = 4


class File(NamedTuple):
    """The entry of the manifest for one file."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """The fields of the manifest, in the order in which they are written; `label` is None without labels,
    `row_condition` (as in `_structure`) and `condition` (the files of each of its arrays) without conditions that are
    no labels, `class_names` if the names are not known."""

    version: int
    rows: int
    row_shape: list[int]
    dtype: str
    labels: int | None
    x: list[File]
    label: list[File] | None
    crc: list[File]
    row_condition: dict[str, Any] | None
    condition: list[list[File]] | None
    class_names: list[str] | None
    digest: str


def name_of_file(kind: str, number: int) -> str:
    """The name of the file with the data (kind "x"), the labels ("label"), an array of the condition ("condition_0",
    "condition_1", ... in the order of `jax.tree.leaves`) or the checksums ("crc") of a shard."""
    return f"{kind}_{number:05}.npy"


def as_text(manifest: Manifest) -> str:
    """The manifest with its digest, as JSON."""
    return json.dumps(_plain(manifest._replace(digest=_digest(manifest))), indent=1) + "\n"


def _plain(manifest: Manifest) -> dict[str, Any]:
    """The manifest as dictionaries and lists, for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, File):
            return value._asdict()
        return [plain(each) for each in value] if isinstance(value, list) else value

    return {field: plain(value) for field, value in manifest._asdict().items()}


def _digest(manifest: Manifest) -> str:
    """SHA-256 of all other fields of the manifest; since they include those of all files, it identifies the data."""
    text = json.dumps(_plain(manifest._replace(digest="")), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Every field and the digest are checked, but nothing is compared with other files."""
    values = read_json_object(path)
    if (version := values.get("version", VERSION)) != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {_short(version)}: the data must be converted again")
    manifest = Manifest(**_fields(str(path), values, Manifest._fields))
    _check_values(path, manifest)
    manifest = manifest._replace(
        x=_read_files(path, "x", manifest.x, None),
        label=None if manifest.label is None else _read_files(path, "label", manifest.label, len(manifest.x)),
        crc=_read_files(path, "crc", manifest.crc, len(manifest.x)),
        condition=_read_condition(path, manifest),
    )
    if manifest.digest != (wanted := _digest(manifest)):
        rule = f"{wanted[:16]}..., the digest of the other fields"
        raise ValueError(f"{path}: digest must be {rule}, got {_short(manifest.digest)}")
    return manifest


def _fields(name: str, values: Any, wanted: Sequence[str]) -> dict[str, Any]:
    """`values` if it is a JSON object with exactly these fields."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: must be an object, got {type(values).__name__}")
    if missing := [field for field in wanted if field not in values]:
        raise ValueError(f"{name}: must have {', '.join(wanted)}; got no {', '.join(missing)}")
    if extra := [field for field in values if field not in wanted]:
        raise ValueError(f"{name}: must have only {', '.join(wanted)}, got {', '.join(extra)[:60]} too")
    return values


def _check_values(path: Path, manifest: Manifest) -> None:
    """Checks types and ranges of the fields, but not yet the entries in the lists of files."""
    shape = manifest.row_shape
    for name, fits, rule in (
        ("version", _is_count(manifest.version), "an integer"),
        ("rows", _is_count(manifest.rows), "an integer >= 1"),
        ("row_shape", isinstance(shape, list) and all(map(_is_count, shape)), "a list of integers >= 1"),
        ("dtype", isinstance(manifest.dtype, str), "a name"),
        ("labels", manifest.labels is None or _is_count(manifest.labels), "an integer >= 1 or null"),
        ("x", isinstance(manifest.x, list) and len(manifest.x) > 0, "a list of files"),
        ("label", manifest.label is None or isinstance(manifest.label, list), "a list of files or null"),
        ("label", (manifest.label is None) == (manifest.labels is None), "given if and only if labels is"),
        ("crc", isinstance(manifest.crc, list), "a list of files"),
        ("class_names", _are_names(manifest.class_names, manifest.labels), "a list of a text for each label"),
    ):
        if not fits:
            raise ValueError(f"{path}: {name} must be {rule}, got {_short(getattr(manifest, name))}")


def _read_files(path: Path, kind: str, values: list[Any], wanted: int | None) -> list[File]:
    if wanted not in (None, len(values)):
        raise ValueError(f"{path}: {kind} must have {wanted} files as x has, got {len(values)}")
    return [
        _read_file(f"{path}: {kind} {number}", name_of_file(kind, number), value) for number, value in enumerate(values)
    ]


def _read_condition(path: Path, manifest: Manifest) -> list[list[File]] | None:
    """The files of each array of the condition, None without one."""
    if manifest.row_condition is None and manifest.condition is None:
        return None
    try:
        arrays = len(jax.tree.leaves(_structure.from_json(manifest.row_condition)))
    except ValueError as error:
        raise ValueError(f"{path}: row_condition {error}") from None
    condition = manifest.condition
    if manifest.label is not None or not isinstance(condition, list) or len(condition) != arrays:
        rule = f"a list for each of the {arrays} arrays of row_condition, without labels"
        raise ValueError(f"{path}: condition must be {rule}, got {_short(condition)}")
    if not all(isinstance(several, list) for several in condition):
        raise ValueError(f"{path}: condition must be lists of files, got {_short(condition[0])}")
    return [
        _read_files(path, f"condition_{number}", several, len(manifest.x)) for number, several in enumerate(condition)
    ]


def _read_file(where: str, name: str, values: Any) -> File:
    file = File(**_fields(where, values, File._fields))
    for field, fits, rule in (
        ("name", file.name == name, name),  # so that no name can lead to another folder
        ("rows", _is_count(file.rows), "an integer >= 1"),
        ("bytes", _is_count(file.bytes), "an integer >= 1"),
        ("sha256", isinstance(file.sha256, str) and len(file.sha256) == 64, "64 hexadecimal digits"),
    ):
        if not fits:
            raise ValueError(f"{where}: {field} must be {rule}, got {_short(getattr(file, field))}")
    return file


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_names(value: Any, labels: Any) -> bool:
    """Whether the names of classes are left out, or a text for each label."""
    if value is None:
        return True
    return isinstance(value, list) and len(value) == labels and all(isinstance(name, str) for name in value)


def _short(value: Any) -> str:
    """A value from a file, shortened for an error message."""
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else repr(value)[:60]
