"""Batches: rows of training data, each with its number."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Int, PyTree, Shaped


class Batch(eqx.Module):
    """Rows of training data.

    **Arguments:** `x` data with a leading batch axis (channels first for images; a PyTree if `TrainStep.prepare`
    turns it into data); `condition` a PyTree with the same leading axis, or None; `index` each row's index in the
    global batch, 0, 1, ... by default (pass it when `x` is a part of a larger batch). With a scalar `index` the batch
    is a single row without batch axis.
    """

    x: PyTree[Shaped[ArrayLike, "..."]]
    condition: PyTree[Shaped[ArrayLike, "..."]]
    index: Int[Array | np.ndarray, "..."]

    def __init__(
        self,
        x: PyTree[Shaped[ArrayLike, "..."]],
        condition: PyTree[Shaped[ArrayLike, "..."]] = None,
        index: Int[Array | np.ndarray, "..."] | None = None,
    ):
        self.x = x
        self.condition = condition
        if index is not None and np.ndim(index) == 0:  # a single row, as `TrainStep.prepare` gets it
            self.index = index
            return
        shapes = [np.shape(leaf)[:1] for leaf in jax.tree.leaves((x, condition, index))]
        if len(set(shapes)) != 1 or shapes[0] == ():
            raise ValueError(f"x, condition and index must share their leading batch axis, got {shapes}")
        self.index = np.arange(*shapes[0], dtype=np.int32) if index is None else index
