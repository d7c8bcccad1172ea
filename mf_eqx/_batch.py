"""Batches: rows of training data, each with its number."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped


class Batch(eqx.Module):
    """Rows of training data.

    **Arguments:** `x` data with a leading batch axis (channels first for images; a PyTree if `TrainStep.prepare`
    turns it into data); `condition` a PyTree with the same leading axis, or None; `index` each row's index in the
    global batch, 0, 1, ... by default (pass it when `x` is a part of a larger batch). With a scalar `index` the batch
    is a single row without batch axis. `eps` the other end of each row's path, of the shape of `x`, for data whose ends
    belong together; None for Gaussian noise, which is then drawn for each row and step. Ends belong together in pairs
    of noise and what an ODE makes of it (rectified flow, arXiv 2209.03003), in an optimal coupling
    (`mf_eqx.data.optimal_pairs`), or where one image is to become another.
    """

    x: PyTree[Shaped[ArrayLike, "..."]]
    condition: PyTree[Shaped[ArrayLike, "..."]]
    index: Int[Array | np.ndarray, "..."]
    eps: Float[Array | np.ndarray, "..."] | None

    def __init__(
        self,
        x: PyTree[Shaped[ArrayLike, "..."]],
        condition: PyTree[Shaped[ArrayLike, "..."]] = None,
        index: Int[Array | np.ndarray, "..."] | None = None,
        eps: Float[Array | np.ndarray, "..."] | None = None,
    ):
        self.x, self.condition, self.eps = x, condition, eps
        if index is not None and np.ndim(index) == 0:  # a single row, as `TrainStep.prepare` gets it
            self.index = index
            return
        shapes = [np.shape(leaf)[:1] for leaf in jax.tree.leaves((x, condition, index, eps))]
        if len(set(shapes)) != 1 or shapes[0] == ():
            raise ValueError(f"x, condition, index and eps must share their leading batch axis, got {shapes}")
        self.index = np.arange(*shapes[0], dtype=np.int32) if index is None else index


def check_eps(batch: Batch) -> None:
    """Raises a `ValueError` unless the batch has no eps, or floating-point ones of the shape of x."""
    if batch.eps is None:
        return
    shape, (dtype, found) = jnp.shape(batch.x), (batch.eps.dtype, batch.eps.shape)
    if found != shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"eps must be floating-point numbers of the shape of x, {shape}, got {dtype} of shape {found}")


def check_batch(name: str, batch: Any) -> None:
    """Raises a `ValueError` unless `batch`, which is called `name`, is a `Batch`."""
    if not isinstance(batch, Batch):
        is_array = isinstance(batch, jax.Array | np.ndarray)
        found = f"an array of shape {batch.shape}" if is_array else type(batch).__name__
        raise ValueError(f"{name} must be a Batch, such as mfx.Batch(x), got {found}")
