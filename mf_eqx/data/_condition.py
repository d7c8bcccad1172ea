"""Conditions of rows that are not single labels: PyTrees of arrays whose leading axis is the rows, such as a vector for
each row, a dictionary of vectors and images, or tokens.

Values are checked in the dtype in which they are used: the one to which JAX converts them, which is int32 for int64 and
float32 for float64 without `jax_enable_x64`.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree, Shaped

from .._leaves import by_name
from . import _check

RowCondition: TypeAlias = PyTree[Any]
"""The condition of one row without its values: a `jax.ShapeDtypeStruct` for each array, or None without a condition."""


def as_arrays(condition: PyTree[Any], rows: int) -> PyTree[Any]:
    """The same condition as arrays of NumPy.

    **Arguments:** `condition` a PyTree with at least one array; `rows` how many rows each of them must have.

    **Raises:** `ValueError` that names the leaf: no arrays, another number of rows, empty axes, or a dtype that no
    field can use.
    """
    named = by_name("condition", condition)
    if not named:
        raise ValueError(f"condition must hold at least one array or be None, got {condition!r:.60}")
    for name, leaf in named.items():
        shape, dtype = np.shape(leaf), np.asarray(leaf).dtype
        if shape[:1] != (rows,):
            found = f"shape {shape}" if shape else f"{leaf!r:.60}"
            raise ValueError(f"{name} must be an array whose leading axis has the {rows} rows of x, got {found}")
        _check_row(name, shape[1:], dtype)
    return jax.tree.map(np.asarray, condition)


def row_of(condition: PyTree[Any]) -> RowCondition:
    """The structure, shapes and dtypes of one row of a condition."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype.newbyteorder("=")), condition)


def check_row_condition(row: RowCondition) -> None:
    """Refuses shapes and dtypes of one row's condition that no field can use."""
    for name, leaf in by_name("condition", row).items():
        _check_row(name, leaf.shape, leaf.dtype)


def _check_row(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if 0 in shape:
        raise ValueError(f"{name} must have no empty axis, got rows of shape {shape}")
    number = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_
    if not number or dtype.itemsize > 8:
        raise ValueError(f"{name} must be of numbers of at most 64 bits, floating point, integer or bool, got {dtype}")


def take(condition: PyTree[Any], row: RowCondition, rows: Int[np.ndarray, " rows"]) -> PyTree[Any]:
    """The rows with these numbers, in native byte order."""
    return jax.tree.map(lambda leaf, like: leaf[rows].astype(like.dtype, copy=False), condition, row)


def check_like(condition: PyTree[Any], row: RowCondition, rows: int) -> None:
    """Refuses a condition of `rows` rows of another structure, shape or dtype than `row`."""
    found, wanted = jax.tree.structure(condition), jax.tree.structure(row)
    if found != wanted:
        raise ValueError(f"condition must have the structure {wanted}, got {found}")
    likes = by_name("condition", row)
    for name, leaf in by_name("condition", condition).items():
        shape, dtype = (rows, *likes[name].shape), likes[name].dtype
        if leaf.shape != shape or leaf.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} of shape {shape}, got {leaf.dtype} of shape {leaf.shape}")


def check_values(condition: PyTree[Any], numbers: Int[np.ndarray, " rows"]) -> None:
    """Refuses values that are not finite, and integers that are out of range, in the dtype in which JAX uses them.

    **Arguments:** `condition` arrays of rows; `numbers` of these rows in error messages.
    """
    for name, leaf in by_name("condition", condition).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            _check.check_finite_rows(leaf, numbers, name)
        elif jnp.issubdtype(leaf.dtype, jnp.integer):
            _check_range(name, leaf, numbers)


def _check_range(name: str, leaf: Shaped[np.ndarray, "rows ..."], numbers: Int[np.ndarray, " rows"]) -> None:
    used = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if used == leaf.dtype:
        return
    wrong = (leaf < np.iinfo(used).min) | (leaf > np.iinfo(used).max)
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0])
        rule = f"must fit into {used}, which JAX uses without jax_enable_x64"
        raise ValueError(f"{name} {rule}, got {leaf[first]} in row {numbers[first[0]]}")
