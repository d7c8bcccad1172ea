"""The discrepancy of two sets of samples by the Laplace kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Scalar


def squared_discrepancy(
    y: Float[Array, "samples *data"], other: Float[Array, "others *data"], length: Scalar
) -> Scalar:
    r"""The squared maximum mean discrepancy with the kernel $e^{-|y - y'| / (n \ell)}$ in n dimensions, over all pairs.

    **Arguments:** `y`, `other` samples; `length` $\ell$.
    """
    scale = y[0].size * jnp.maximum(length, jnp.finfo(y.dtype).eps)

    def mean_kernel(a: Float[Array, "samples *data"], b: Float[Array, "others *data"]) -> Scalar:
        squares = jnp.sum((a[:, None] - b[None]) ** 2, axis=tuple(range(2, a.ndim + 1)))
        distances = jnp.sqrt(jnp.maximum(squares, jnp.finfo(y.dtype).eps ** 2))  # its slope at 0 must not be infinite
        return jnp.mean(jnp.exp(-distances / scale))

    return mean_kernel(y, y) + mean_kernel(other, other) - 2 * mean_kernel(y, other)
