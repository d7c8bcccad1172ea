"""Compute precision: parameters are kept in float32 and cast where they are used."""

from typing import TypeVar

import equinox as eqx
import jax
from jax.typing import DTypeLike

_Tree = TypeVar("_Tree")


def cast(tree: _Tree, dtype: DTypeLike) -> _Tree:
    """`tree` with every inexact array in `dtype`. Gradients have the precision of the original arrays."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)
