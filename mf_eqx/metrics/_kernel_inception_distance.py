r"""Kernel Inception Distance: the squared maximum mean discrepancy of features under a polynomial kernel,

$$k(x, y) = \Big(\frac{x \cdot y}{d} + 1\Big)^3,$$

estimated without bias, unlike the Fréchet distance, so that results for samples of different sizes can be compared.
"""

import numpy as np
from jaxtyping import Array, Float

from .._validate import as_count, check_finite
from ._distance import check_samples
from ._inception_score import MeanAndStd


def kernel_inception_distance(
    a: Float[Array | np.ndarray, "sample_a dim"],
    b: Float[Array | np.ndarray, "sample_b dim"],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> MeanAndStd:
    r"""Kernel Inception Distance (KID) of two samples of features: the mean over random subsets of both, of equal size
    m, of the unbiased estimate

    $$\frac{1}{m (m - 1)} \sum_{i \ne j} \big(k(a_i, a_j) + k(b_i, b_j)\big) - \frac{2}{m^2} \sum_{i, j} k(a_i, b_j),
      \qquad k(x, y) = (x \cdot y / d + 1)^3.$$

    It is computed in float64 on the host. Since it is unbiased, it is negative in about half of all cases if both
    samples come from one distribution.

    **Arguments:**

    - `a`, `b`: the features, one point per row.
    - `subsets`: their number; `size`: m, drawn without replacement. The literature has 100 subsets of 1000.
    - `seed`: of the subsets (NumPy's PCG64).

    **Returns:** mean and standard deviation over subsets. Some tables report 1000 times these values.

    **Raises:** `ValueError` if `a` or `b` is not (sample, dim), if their dims differ, if a value is not finite, if
    `size` is below two or above one of the samples, if `subsets` is below one, or if these or `seed` are no integers.

    **Reference:** Demystifying MMD GANs, Bińkowski, Sutherland, Arbel and Gretton, 2018, arXiv 1801.01401.
    """
    check_samples(a=a, b=b)
    check_finite("`a`", a)
    check_finite("`b`", b)
    least, subsets, seed = min(len(a), len(b)), as_count("subsets", subsets), as_count("seed", seed, 0)
    if not 2 <= (size := as_count("size", size)) <= least:
        raise ValueError(f"size of subsets must be at least 2 and at most the smaller sample, {least}, got {size}")
    a, b, generator = np.asarray(a), np.asarray(b), np.random.Generator(np.random.PCG64(seed))
    values = [_discrepancy(_subset(generator, a, size), _subset(generator, b, size)) for _ in range(subsets)]
    return MeanAndStd(float(np.mean(values)), float(np.std(values)))


def _subset(generator: np.random.Generator, points: np.ndarray, size: int) -> Float[np.ndarray, "size dim"]:
    return points[generator.choice(len(points), size, replace=False)].astype(np.float64)


def _discrepancy(a: Float[np.ndarray, "size dim"], b: Float[np.ndarray, "size dim"]) -> float:
    within = _sum_of_pairs(a) + _sum_of_pairs(b)
    return within / (len(a) * (len(a) - 1)) - 2 * float(np.mean(_kernel(a, b)))


def _sum_of_pairs(points: Float[np.ndarray, "size dim"]) -> float:
    """The sum of the kernel over all pairs of different points."""
    kernel = _kernel(points, points)
    return float(kernel.sum() - np.trace(kernel))


def _kernel(a: Float[np.ndarray, "size dim"], b: Float[np.ndarray, "size dim"]) -> Float[np.ndarray, "size size"]:
    return (a @ b.T / a.shape[1] + 1) ** 3
