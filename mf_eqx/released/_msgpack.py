"""Files of `flax.serialization.to_bytes`, read without flax: a msgpack map of nested maps, whose leaves are arrays.

    extension 1    an array: msgpack of [shape, name of the dtype, bytes in C order]
    extension 3    a NumPy scalar, in the same form
    a map with __msgpack_chunked_array__, shape and chunks
                   an array of more than 2**30 bytes: its shape and its flat pieces, both as maps "0", "1", ...

What flax writes through Orbax instead is a folder, see `_orbax.py`.

Source: flax 0.12, `flax/serialization.py`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from .._files import open_regular
from .._leaves import listed
from .._optional import optional
from ._orbax import read_orbax

_ARRAYS = (1, 3)
_CHUNKED = "__msgpack_chunked_array__"
_BITS = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64), "complex": (64, 128)}
_DTYPES = {"bool", "bfloat16"} | {f"{kind}{bits}" for kind, widths in _BITS.items() for bits in widths}
_MOST = 100_000
"""The largest number of entries in one map or list. A file may declare any number, and msgpack allocates memory for so
many entries before it reads them."""


def read_flax(path: str | Path, part: str | None = None) -> dict[str, Any]:
    """The content of a file of `flax.serialization.to_bytes`, or of a folder that flax wrote through Orbax: nested
    dictionaries whose leaves are NumPy arrays.

    bfloat16 is converted to float32, which is exact. NumPy scalars become arrays without axes.

    **Arguments:** `path` of the file or folder; `part` the name at the top level whose content is returned, such as
    `ema_params`, or None for everything. All other parts, usually most of the file, are skipped, and their arrays are
    not created.

    **Raises:** `MissingDependency` without msgpack, which is installed with Orbax; `OSError` if the file cannot be
    read; `ValueError` that names the file if it has another format, is truncated, has more bytes after its end, holds
    anything but arrays and plain values, or has no dictionary under `part`.
    """
    content = read_orbax(path, part) if Path(path).is_dir() else _read_file(path, part)
    if part is None:
        return content
    if not isinstance(content.get(part), dict):
        found = listed(sorted(content), 8) or "nothing"
        raise ValueError(f"{path}: must hold a dictionary named {part}, got {found}")
    return content[part]


def _read_file(path: str | Path, part: str | None) -> dict[str, Any]:
    with optional("msgpack"):
        import msgpack
    with open_regular(path) as file:
        try:
            return _read(file, part)
        except (msgpack.UnpackException, ValueError, OverflowError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path}: must be a file of flax.serialization.to_bytes, but: {reason}") from error


def flat(tree: Mapping[str, Any], path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays of nested dictionaries, by their keys from the outermost to the innermost, joined with slashes.

    **Raises:** `ValueError` for a leaf that is not an array, or for two arrays of one name.
    """
    arrays: dict[str, Any] = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while pending:
        names, node = pending.pop()
        if isinstance(node, Mapping):
            pending += [((*names, name), child) for name, child in node.items()]
            continue
        name = "/".join(names)
        if not isinstance(node, np.ndarray):
            raise ValueError(f"{path}: {name} must be an array, got {type(node).__name__}")
        if name in arrays:
            raise ValueError(f"{path}: must hold one tensor of each name, got two named {name}")
        arrays[name] = node
    return arrays


def _read(file: BinaryIO, part: str | None) -> dict[str, Any]:
    """The map at the top level, with None for the parts that are skipped."""
    import msgpack

    unpacker = msgpack.Unpacker(
        file,
        read_size=1 << 20,
        max_buffer_size=0,  # 0 means the largest size that is possible: a piece of an array has up to 2**30 bytes
        max_array_len=_MOST,
        max_map_len=_MOST,
        object_pairs_hook=_map,
        ext_hook=_array,
    )
    pairs = []
    for _ in range(unpacker.read_map_header()):
        name = unpacker.unpack()
        pairs.append((name, unpacker.unpack() if part in (None, name) else unpacker.skip()))
    if extra := os.fstat(file.fileno()).st_size - unpacker.tell():
        raise ValueError(f"it has {extra} more bytes after its end")
    content = _map(pairs)
    if not isinstance(content, dict):
        raise ValueError("it holds a single array instead of a dictionary")
    return content


def _map(pairs: list[tuple[Any, Any]]) -> Any:
    if unknown := [name for name, _ in pairs if not isinstance(name, str)]:
        raise ValueError(f"its names must be text, got {unknown[0]!r:.40}")
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"its names must differ within each dictionary, got {listed(_repeated(pairs))} twice")
    return _joined(entries) if _CHUNKED in entries else entries


def _repeated(pairs: list[tuple[str, Any]]) -> list[str]:
    names = [name for name, _ in pairs]
    return sorted({name for name in names if names.count(name) > 1})


def _joined(entries: dict[str, Any]) -> Shaped[np.ndarray, "..."]:
    """An array from its pieces."""
    shape, chunks = (list(_in_order(entries.get(name))) for name in ("shape", "chunks"))
    whole = all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks)
    if not chunks or not whole or len({chunk.dtype for chunk in chunks}) > 1:
        raise ValueError("the pieces of an array must be flat arrays of one dtype")
    _check_shape(shape, sum(chunk.size for chunk in chunks))
    return np.concatenate(chunks).reshape(shape)


def _in_order(numbered: Any) -> Iterator[Any]:
    """The values of {"0": ..., "1": ..., ...}, in the order of their numbers."""
    if not isinstance(numbered, dict) or numbered.keys() != {str(i) for i in range(len(numbered))}:
        raise ValueError("the shape and the pieces of an array must be numbered from 0")
    return (numbered[str(i)] for i in range(len(numbered)))


def _array(code: int, content: bytes) -> Shaped[np.ndarray, "..."]:
    if code not in _ARRAYS:
        raise ValueError(f"its extensions must be arrays (1, 3), got {code}")
    shape, dtype, values = _unpacked(content)
    _check_shape(shape, len(values) // dtype.itemsize, len(values) % dtype.itemsize)
    array = np.ndarray(tuple(shape), dtype, values)
    return array.astype(np.float32) if dtype == jnp.bfloat16 else array


def _unpacked(content: bytes) -> tuple[list[Any], np.dtype, bytes]:
    import msgpack

    match msgpack.unpackb(content, raw=False, max_array_len=_MOST, max_map_len=_MOST):
        case [list() as shape, str() as name, bytes() as values]:
            if name not in _DTYPES:
                raise ValueError(f"its arrays must be of numbers, got dtype {name!r:.40}")
            return shape, np.dtype(jnp.bfloat16 if name == "bfloat16" else name), values
    raise ValueError("its arrays must be shape, dtype and bytes")


def _check_shape(shape: list[Any], size: int, extra_bytes: int = 0) -> None:
    """Refuses a shape that is not that of `size` values, and refuses any extra bytes after the last value."""
    if not all(type(length) is int and length >= 0 for length in shape) or math.prod(shape) != size or extra_bytes:
        more = f" and {extra_bytes} bytes" if extra_bytes else ""
        raise ValueError(f"its arrays must have the size that their shape says, got {size} values{more} for {shape}")
