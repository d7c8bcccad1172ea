"""The manifest of a folder of shards: a JSON file that describes all other files and has a digest of its own.

A manifest is not trusted: the type and range of every field are checked, and the name of every file must be that of
`name_of_file`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from .._json import read_json_object

MANIFEST = "manifest.json"
VERSION = 2


class File(NamedTuple):
    """The entry of the manifest for one file."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """The fields of the manifest, in the order in which they are written; `label` is None without labels."""

    version: int
    rows: int
    row_shape: list[int]
    dtype: str
    labels: int | None
    x: list[File]
    label: list[File] | None
    crc: list[File]
    digest: str


def name_of_file(kind: str, number: int) -> str:
    """The name of the file with the data (kind "x"), the labels ("label") or the checksums ("crc") of a shard."""
    return f"{kind}_{number:05}.npy"


def as_text(manifest: Manifest) -> str:
    """The manifest with its digest, as JSON."""
    return json.dumps(_plain(manifest._replace(digest=_digest(manifest))), indent=1) + "\n"


def _plain(manifest: Manifest) -> dict[str, Any]:
    """The manifest as dictionaries and lists, for JSON."""
    files = {"x": manifest.x, "label": manifest.label, "crc": manifest.crc}
    return manifest._asdict() | {
        kind: None if several is None else [file._asdict() for file in several] for kind, several in files.items()
    }


def _digest(manifest: Manifest) -> str:
    """SHA-256 of all other fields of the manifest; since they include those of all files, it identifies the data."""
    text = json.dumps(_plain(manifest._replace(digest="")), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Every field and the digest are checked, but nothing is compared with other files."""
    values = read_json_object(path)
    if values.get("version", VERSION) != VERSION:
        found = _short(values["version"])
        raise ValueError(f"{path}: version must be {VERSION}, got {found}: the data must be converted again")
    fields = _fields(str(path), values, Manifest)
    manifest = Manifest(**fields)
    _check_values(path, manifest)
    manifest = manifest._replace(
        x=_read_files(path, "x", manifest.x, None),
        label=None if manifest.label is None else _read_files(path, "label", manifest.label, len(manifest.x)),
        crc=_read_files(path, "crc", manifest.crc, len(manifest.x)),
    )
    if manifest.digest != (wanted := _digest(manifest)):
        rule = f"{wanted[:16]}..., the digest of the other fields"
        raise ValueError(f"{path}: digest must be {rule}, got {_short(manifest.digest)}")
    return manifest


def _fields(name: str, values: Any, kind: type[Manifest] | type[File]) -> dict[str, Any]:
    """`values` if it is a JSON object with exactly the fields of `kind`."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: must be an object, got {type(values).__name__}")
    if missing := [field for field in kind._fields if field not in values]:
        raise ValueError(f"{name}: must have {', '.join(kind._fields)}; got no {', '.join(missing)}")
    if extra := [field for field in values if field not in kind._fields]:
        raise ValueError(f"{name}: must have only {', '.join(kind._fields)}, got {', '.join(extra)[:60]} too")
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
    ):
        if not fits:
            raise ValueError(f"{path}: {name} must be {rule}, got {_short(getattr(manifest, name))}")


def _read_files(path: Path, kind: str, values: list[Any], wanted: int | None) -> list[File]:
    if wanted not in (None, len(values)):
        raise ValueError(f"{path}: {kind} must have {wanted} files as x has, got {len(values)}")
    return [
        _read_file(f"{path}: {kind} {number}", name_of_file(kind, number), value) for number, value in enumerate(values)
    ]


def _read_file(where: str, name: str, values: Any) -> File:
    file = File(**_fields(where, values, File))
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


def _short(value: Any) -> str:
    """A value from a file, shortened for an error message."""
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else repr(value)[:60]
