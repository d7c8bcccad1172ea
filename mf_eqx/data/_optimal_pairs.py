r"""Optimal couplings of data and noise within a batch: minibatch optimal transport."""

import numpy as np
from jaxtyping import Array, Float


def optimal_pairs(
    x: Float[Array | np.ndarray, "rows *data"], eps: Float[Array | np.ndarray, "rows *data"]
) -> Float[np.ndarray, "rows *data"]:
    r"""The rows of eps in the order that makes $\sum_i |x_i - \epsilon_i|^2$ least, for `Batch(x, condition, eps=...)`.

    Paths between such pairs cross less often than between independent ones, so that trajectories of the marginal
    velocity become straighter. The noise that belongs to a condition is no longer Gaussian, only that of the whole
    batch; so pair the rows of each class for themselves where samples are drawn by class.

    Computed on the host by SciPy, which JAX requires, in a time that grows as the cube of the number of rows: 9 ms for
    256 rows of two numbers and half a second for 1,024 on one CPU core.

    **Arguments:** `x` data; `eps` noise of the same shape.

    **Raises:** `ValueError` for other shapes, without rows, or for values that are not finite.

    **Reference:** Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport, Tong,
    Fatras, Malkin, Huguet, Zhang, Rector-Brooks, Wolf, Bengio, 2024, arXiv 2302.00482; Multisample Flow Matching,
    Pooladian, Ben-Hamu, Domingo-Enrich, Amos, Lipman, Chen, 2023, arXiv 2304.14772.
    """
    from scipy.optimize import linear_sum_assignment

    if x.shape != eps.shape or x.ndim < 1 or len(x) == 0:
        raise ValueError(f"eps must have the shape of x, with at least one row, got {eps.shape} and {x.shape}")
    first, second = (np.asarray(rows, np.float64).reshape(len(rows), -1) for rows in (x, eps))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("x and eps must be finite, got values that are not")
    _, order = linear_sum_assignment(-first @ second.T)  # |x|^2 and |eps|^2 are the same in any order
    return np.asarray(eps)[order]
