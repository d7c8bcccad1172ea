"""A state as a flat dictionary of arrays by their paths, and back: what files hold."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

_State = TypeVar("_State")


def leaves(tree: PyTree[Any]) -> dict[str, Any]:
    """The arrays of a tree, or their shapes, by their paths."""
    arrays = jax.tree.leaves_with_path(eqx.filter(tree, _is_array_or_shape))
    return {jax.tree_util.keystr(path): leaf for path, leaf in arrays}


def plain(leaf: Any) -> Any:
    """The array itself, or the integers of random keys; of a shape likewise."""
    if not _is_key(leaf):
        return leaf
    return jax.eval_shape(jr.key_data, leaf) if _is_shape(leaf) else jr.key_data(leaf)


def shapes(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and dtype of each, as JSON holds them."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def rebuilt(wanted: _State, arrays: Mapping[str, Any]) -> _State:
    """`wanted` with arrays in place of shapes."""

    def fill(path: Any, leaf: Any) -> Any:
        if not _is_shape(leaf):
            return leaf
        array = arrays[jax.tree_util.keystr(path)]
        return jr.wrap_key_data(array, impl=_implementation(leaf)) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(fill, wanted)


def _implementation(key: jax.ShapeDtypeStruct) -> Any:
    """Of random keys, of which there are only shape and dtype."""
    found = []
    jax.eval_shape(lambda key: found.append(jr.key_impl(key)), key)
    return found[0]


def _is_array_or_shape(leaf: Any) -> bool:
    return eqx.is_array(leaf) or _is_shape(leaf)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def on_host(leaf: Any) -> np.ndarray:
    """The whole array, whatever devices and processes have parts of it."""
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def digest(arrays: Mapping[str, Any], start: str = "") -> str:
    """SHA-256 of a text and of all arrays with their names, in their order, in hexadecimal digits."""
    found = hashlib.sha256(start.encode())
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype} {array.shape};".encode())
        found.update(on_host(array).tobytes())
    return found.hexdigest()


def compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuses the `shapes` of a file unless they are those that are wanted, and says what differs."""
    missing, extra = [*(wanted.keys() - saved.keys())], [*(saved.keys() - wanted.keys())]
    changed = [
        f"{name} is {saved[name][1]} {tuple(saved[name][0])}, not {wanted[name][1]} {tuple(wanted[name][0])}"
        for name in wanted.keys() & saved.keys()
        if saved[name] != wanted[name]
    ]
    parts = [("lacks", missing), ("has, and nothing asks for,", extra), ("differs:", changed)]
    if text := "; ".join(f"{word} {listed(sorted(names))}" for word, names in parts if names):
        raise ValueError(f"{path}: must hold the arrays that are asked for, but it {text}")


def listed(names: list[str], most: int = 3) -> str:
    """The first few of them, and how many more there are."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")
