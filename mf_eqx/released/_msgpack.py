"""Files of `flax.serialization.to_bytes`, without flax: one msgpack map, in it maps by name, and arrays at the ends.

    extension 1    an array: msgpack of [shape, name of the dtype, bytes in C order]
    extension 3    a NumPy scalar, the same
    a map with __msgpack_chunked_array__, shape and chunks
                   an array of more than 2**30 bytes: its sizes, and flat pieces of it, both as maps "0", "1", ...

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

_ARRAYS = (1, 3)
_CHUNKED = "__msgpack_chunked_array__"
_BITS = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64), "complex": (64, 128)}
_DTYPES = {"bool", "bfloat16"} | {f"{kind}{bits}" for kind, widths in _BITS.items() for bits in widths}
_MOST = 100_000
"""Entries of one map or list. A file may announce any number, and room is made for it before they are read."""


def read_flax(path: str | Path, part: str | None = None) -> dict[str, Any]:
    """What a file of `flax.serialization.to_bytes` holds: nested dictionaries, NumPy arrays at their ends.

    bfloat16 is read into float32, which loses nothing. Scalars of NumPy become arrays without axes.

    **Arguments:** `path` of the file; `part`: the name at the top whose content is wanted, such as `ema_params`. All
    else, usually the larger share, is passed over unread. None for everything.

    **Raises:** `MissingDependency` without msgpack, which Orbax brings along; `OSError` if it cannot be read;
    `ValueError` that names it if it is no such file, cut off, has more behind its end, holds anything but arrays and
    plain values, or nothing under `part`.
    """
    with optional("msgpack", extra=None):
        import msgpack
    with open_regular(path) as file:
        try:
            held = _read(file, part)
        except (msgpack.UnpackException, ValueError, OverflowError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path}: must be a file of flax.serialization.to_bytes, but: {reason}") from error
    if part is None:
        return held
    if not isinstance(held.get(part), dict):
        found = listed(sorted(held), 8) or "nothing"
        raise ValueError(f"{path}: must hold a dictionary named {part}, got {found}")
    return held[part]


def flat(tree: Mapping[str, Any], path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Arrays of nested dictionaries by their names from the outside in, joined by slashes.

    **Raises:** `ValueError` for what is no array, or two of one name.
    """
    found: dict[str, Any] = {}
    left: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while left:
        names, node = left.pop()
        if isinstance(node, Mapping):
            left += [((*names, name), child) for name, child in node.items()]
            continue
        name = "/".join(names)
        if not isinstance(node, np.ndarray):
            raise ValueError(f"{path}: {name} must be an array, got {type(node).__name__}")
        if name in found:
            raise ValueError(f"{path}: must hold one tensor of each name, got two named {name}")
        found[name] = node
    return found


def _read(file: BinaryIO, part: str | None) -> dict[str, Any]:
    """The map at the top, with None for what is passed over."""
    import msgpack

    unpacker = msgpack.Unpacker(
        file,
        read_size=1 << 20,
        max_buffer_size=0,  # as large as it can be: one piece of an array has up to 2**30 bytes
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
        raise ValueError(f"it goes on for {extra} bytes behind its end")
    held = _map(pairs)
    if not isinstance(held, dict):
        raise ValueError("it holds one array alone")
    return held


def _map(pairs: list[tuple[Any, Any]]) -> Any:
    if unknown := [name for name, _ in pairs if not isinstance(name, str)]:
        raise ValueError(f"its names must be text, got {unknown[0]!r:.40}")
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError(f"its names must differ within each dictionary, got {listed(_repeated(pairs))} twice")
    return _joined(held) if _CHUNKED in held else held


def _repeated(pairs: list[tuple[str, Any]]) -> list[str]:
    names = [name for name, _ in pairs]
    return sorted({name for name in names if names.count(name) > 1})


def _joined(held: dict[str, Any]) -> Shaped[np.ndarray, "..."]:
    """An array from its pieces."""
    shape, chunks = (list(_in_order(held.get(name))) for name in ("shape", "chunks"))
    whole = all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks)
    if not chunks or not whole or len({chunk.dtype for chunk in chunks}) > 1:
        raise ValueError("the pieces of an array must be flat arrays of one dtype")
    _check_shape(shape, sum(chunk.size for chunk in chunks))
    return np.concatenate(chunks).reshape(shape)


def _in_order(held: Any) -> Iterator[Any]:
    """The values of {"0": ..., "1": ..., ...}."""
    if not isinstance(held, dict) or held.keys() != {str(i) for i in range(len(held))}:
        raise ValueError("the shape and the pieces of an array must be numbered from 0")
    return (held[str(i)] for i in range(len(held)))


def _array(code: int, content: bytes) -> Shaped[np.ndarray, "..."]:
    if code not in _ARRAYS:
        raise ValueError(f"its extensions must be arrays (1, 3), got {code}")
    shape, dtype, values = _parts(content)
    _check_shape(shape, len(values) // dtype.itemsize, len(values) % dtype.itemsize)
    array = np.ndarray(tuple(shape), dtype, values)
    return array.astype(np.float32) if dtype == jnp.bfloat16 else array


def _parts(content: bytes) -> tuple[list[Any], np.dtype, bytes]:
    import msgpack

    match msgpack.unpackb(content, raw=False, max_array_len=_MOST, max_map_len=_MOST):
        case [list() as shape, str() as name, bytes() as values]:
            if name not in _DTYPES:
                raise ValueError(f"its arrays must be of numbers, got dtype {name!r:.40}")
            return shape, np.dtype(jnp.bfloat16 if name == "bfloat16" else name), values
    raise ValueError("its arrays must be shape, dtype and bytes")


def _check_shape(shape: list[Any], size: int, left: int = 0) -> None:
    """Refuses a shape that is not that of `size` values and `left` bytes more."""
    if not all(type(length) is int and length >= 0 for length in shape) or math.prod(shape) != size or left:
        more = f" and {left} bytes" if left else ""
        raise ValueError(f"its arrays must have the size that their shape says, got {size} values{more} for {shape}")
