"""Conversion between a state and a flat dictionary of arrays by their paths, which is what files hold."""

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


def by_name(name: str, tree: PyTree[Any]) -> dict[str, Any]:
    """The leaves of a tree by `name` followed by their path, such as `condition['label']`."""
    return {name + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def without_key_dtype(leaf: Any) -> Any:
    """The array itself, or for random keys their integers; the same for a `jax.ShapeDtypeStruct`."""
    if not _is_key(leaf):
        return leaf
    return jax.eval_shape(jr.key_data, leaf) if _is_shape(leaf) else jr.key_data(leaf)


def shapes(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and dtype of each array, in a form that JSON can hold."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def fill_shapes(state: _State, arrays: Mapping[str, Any]) -> _State:
    """`state` with the arrays of these paths in place of its `jax.ShapeDtypeStruct`s."""

    def fill(path: Any, leaf: Any) -> Any:
        if not _is_shape(leaf):
            return leaf
        array = arrays[jax.tree_util.keystr(path)]
        return jr.wrap_key_data(array, impl=_implementation(leaf)) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(fill, state)


def _implementation(key: jax.ShapeDtypeStruct) -> Any:
    """The implementation of random keys, of which only shape and dtype are given."""
    implementations = []
    jax.eval_shape(lambda key: implementations.append(jr.key_impl(key)), key)
    return implementations[0]


def _is_array_or_shape(leaf: Any) -> bool:
    return eqx.is_array(leaf) or _is_shape(leaf)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def on_host(leaf: Any) -> np.ndarray:
    """The whole array in host memory, even if its parts are on several devices or processes."""
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def digest_of_arrays(arrays: Mapping[str, Any], start: str = "") -> str:
    """SHA-256 of the text `start` and of all arrays with their names, in this order, as hexadecimal digits."""
    sha256 = hashlib.sha256(start.encode())
    for name, array in arrays.items():
        sha256.update(f"{name} {array.dtype} {array.shape};".encode())
        sha256.update(on_host(array).tobytes())
    return sha256.hexdigest()


def compare(saved: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Raises a `ValueError` that lists the differences unless the `shapes` of a file are the expected ones."""
    missing, extra = [*(expected.keys() - saved.keys())], [*(saved.keys() - expected.keys())]
    changed = [
        f"{name} is {saved[name][1]} {tuple(saved[name][0])}, not {expected[name][1]} {tuple(expected[name][0])}"
        for name in expected.keys() & saved.keys()
        if saved[name] != expected[name]
    ]
    parts = [("lacks", missing), ("has the unexpected", extra), ("differs:", changed)]
    if text := "; ".join(f"{word} {listed(sorted(names))}" for word, names in parts if names):
        raise ValueError(f"{path}: must hold the expected arrays, but it {text}")


def listed(names: list[str], most: int = 3) -> str:
    """The first names, at most `most`, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
