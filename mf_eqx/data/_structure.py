"""The condition of one row, without its values, as JSON: nested objects that tell dictionaries, tuples and lists apart.

{"kind": "array", "shape": [12], "dtype": "float32"}
{"kind": "dict", "entries": {"camera": ..., "joints": ...}}
{"kind": "tuple", "entries": [...]}                             likewise "list"
{"kind": "none"}
"""

from typing import Any

import jax
import numpy as np

_KINDS = {
    "none": [],
    "array": ["shape", "dtype"],
    "dict": ["entries"],
    "tuple": ["entries"],
    "list": ["entries"],
}
"""The kinds of nodes, with the fields of each."""
_DEEPEST = 16
"""The largest number of nested levels."""
_MOST_ARRAYS = 100
_DTYPES = ["bool", "float16", "float32", "float64", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))]


def as_json(row: Any, name: str = "condition", level: int = 0) -> dict[str, Any]:
    """`row`, a PyTree of `jax.ShapeDtypeStruct`, in a form that JSON can hold.

    **Raises:** `ValueError` that names the part which is no dictionary with text as keys, tuple, list, array or None,
    or if there are more than 16 levels.
    """
    if level > _DEEPEST:
        raise ValueError(f"{name} must have at most {_DEEPEST} levels, got more")
    if isinstance(row, jax.ShapeDtypeStruct):
        return {"kind": "array", "shape": list(row.shape), "dtype": np.dtype(row.dtype).name}
    if row is None:
        return {"kind": "none"}
    if type(row) is dict and all(isinstance(key, str) for key in row):
        return {"kind": "dict", "entries": {k: as_json(row[k], f"{name}[{k!r}]", level + 1) for k in sorted(row)}}
    if type(row) in (list, tuple):
        entries = [as_json(entry, f"{name}[{number}]", level + 1) for number, entry in enumerate(row)]
        return {"kind": type(row).__name__, "entries": entries}
    rule = "made of dictionaries with text as keys, tuples, lists and arrays, to be stored"
    raise ValueError(f"{name} must be {rule}, got {type(row).__name__}")


def from_json(value: Any) -> Any:
    """The PyTree of `jax.ShapeDtypeStruct` of which `as_json` made `value`, which is not trusted.

    **Raises:** `ValueError` if it is not such a value, or describes more than 100 arrays.
    """
    row = _node(value, 0)
    if not 1 <= len(jax.tree.leaves(row)) <= _MOST_ARRAYS:
        raise ValueError(f"must describe 1 to {_MOST_ARRAYS} arrays, got {len(jax.tree.leaves(row))}")
    return row


def _node(value: Any, level: int) -> Any:
    kind = value.get("kind") if isinstance(value, dict) else None
    if level > _DEEPEST or not isinstance(kind, str) or kind not in _KINDS or set(value) != {"kind", *_KINDS[kind]}:
        raise ValueError(f"must describe arrays, dictionaries, tuples and lists in at most {_DEEPEST} levels")
    if kind == "none":
        return None
    if kind == "array":
        return _array(value["shape"], value["dtype"])
    entries = value["entries"]
    if not isinstance(entries, dict if kind == "dict" else list):
        raise ValueError(f"must have entries that fit the kind {kind}, got {type(entries).__name__}")
    if isinstance(entries, dict):
        return {key: _node(entry, level + 1) for key, entry in entries.items()}
    nodes = [_node(entry, level + 1) for entry in entries]
    return tuple(nodes) if kind == "tuple" else nodes


def _array(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    if not isinstance(shape, list) or len(shape) > 31 or not all(type(size) is int and size >= 1 for size in shape):
        raise ValueError("must have shapes that are lists of at most 31 integers >= 1")
    if dtype not in _DTYPES:
        raise ValueError(f"must have dtypes among {', '.join(_DTYPES)}, got {dtype!r:.60}")
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
