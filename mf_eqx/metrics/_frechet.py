r"""Fréchet distance of two samples of features: the squared Wasserstein-2 distance of the Gaussians with their moments,

$$d^2 = |\mu_a - \mu_b|^2 + \operatorname{Tr}\big(C_a + C_b - 2 (C_a C_b)^{1/2}\big).$$

For any factors $C = F F^T$, the roots of the eigenvalues of the product $C_a C_b$ are the singular values of
$F_a^T F_b$. So the trace of the root is a sum of singular values. This avoids the root of a general matrix, which
becomes complex or fails if a covariance is singular, as with fewer points than features. It also avoids the root of an
eigenvalue that should be zero but is computed as about 1e-16, since that root would be 1e-8.

Everything is computed in float64 on the host: there are thousands of features, and the trace is a difference of large
terms.
"""

import numpy as np
from jaxtyping import Array, Float

from .._validate import check_finite
from ._distance import check_samples

# Asymmetry and negative eigenvalues, relative to the largest, that are accepted as rounding. Float64 alone would allow
# 1e-12, but published moments are often stored in float32.
_ROUNDING = 1e-5


def frechet_distance(
    a: Float[Array | np.ndarray, "sample_a dim"], b: Float[Array | np.ndarray, "sample_b dim"]
) -> float:
    r"""Fréchet distance of two samples of features ("FID" when the features are those of Inception).

    $$d^2 = |\mu_a - \mu_b|^2 + \operatorname{Tr}\big(C_a + C_b - 2 (C_a C_b)^{1/2}\big)$$

    with the means and the unbiased covariances (divisor: points minus one) of the samples, in float64. As in the
    literature the result is $d^2$, without a root. It is biased upwards for few points: compare only at equal numbers.

    **Arguments:**

    - `a`, `b`: the features, one point per row; the numbers of points may differ, and may be below dim.

    **Returns:** $d^2$. Rounding may make a zero slightly negative; see `frechet_distance_of_moments`.

    **Raises:** `ValueError` if `a` or `b` is not (sample, dim) with at least two points, if their dims differ, or if a
    value is not finite.

    **Reference:** GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, Heusel, Ramsauer,
    Unterthiner, Nessler and Hochreiter, 2017, arXiv:1706.08500.
    """
    check_samples(a=a, b=b, least=2)
    return frechet_distance_of_moments(*_moments("a", a), *_moments("b", b))


def frechet_distance_of_moments(
    mean_a: Float[Array | np.ndarray, " dim"],
    cov_a: Float[Array | np.ndarray, "dim dim"],
    mean_b: Float[Array | np.ndarray, " dim"],
    cov_b: Float[Array | np.ndarray, "dim dim"],
) -> float:
    r"""Fréchet distance of two pairs of moments, for example of features against stored reference statistics.

    $$d^2 = |\mu_a - \mu_b|^2 + \operatorname{Tr}(C_a) + \operatorname{Tr}(C_b)
      - 2 \sum_k \sigma_k, \qquad \sigma = \text{singular values of } F_a^T F_b, \quad C = F F^T$$

    **Arguments:**

    - `mean_a`, `mean_b`: the means $\mu_a$, $\mu_b$.
    - `cov_a`, `cov_b`: the covariances $C_a$, $C_b$: symmetric and positive semi-definite, singular ones included.

    **Returns:** $d^2$. Its rounding error is near 1e-13 of the traces, also for singular covariances. An eigenvalue
    below dim times 2e-16 of the largest is treated as zero, because rounding alone produces such values. For each such
    eigenvalue that is not due to rounding, the error may be up to 1e-6 of the largest eigenvalue.

    **Raises:** `ValueError` if a mean is not a vector, if a covariance does not fit its mean or has non-finite values,
    asymmetry or negative eigenvalues beyond rounding, or if the dims of `a` and `b` differ.

    **Reference:** The Fréchet Distance between Multivariate Normal Distributions, Dowson and Landau, 1982.
    """
    mean_a, cov_a = _check_moments("a", mean_a, cov_a)
    mean_b, cov_b = _check_moments("b", mean_b, cov_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"`mean_a` and `mean_b` must have the same dim, got shapes {mean_a.shape} and {mean_b.shape}.")
    mean_term = np.sum((mean_a - mean_b) ** 2)
    return float(mean_term + np.trace(cov_a) + np.trace(cov_b) - 2 * _trace_of_root(cov_a, cov_b))


def _moments(name: str, features) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
    features = np.asarray(features, np.float64)
    check_finite(f"`{name}`", features)
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _check_moments(name: str, mean, cov) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or mean.size == 0:
        raise ValueError(f"`mean_{name}` must have shape (dim,) with dim >= 1, got shape {mean.shape}.")
    if cov.shape != (mean.size, mean.size):
        raise ValueError(f"`cov_{name}` must have shape {(mean.size, mean.size)}, to fit its mean, got {cov.shape}.")
    for argument, value in ((f"mean_{name}", mean), (f"cov_{name}", cov)):
        check_finite(f"`{argument}`", value)
    asymmetry = np.abs(cov - cov.T).max()
    if asymmetry > _ROUNDING * np.abs(cov).max():
        raise ValueError(f"`cov_{name}` must be symmetric, got entries that differ by {asymmetry} from the transpose.")
    return mean, cov


def _trace_of_root(cov_a: Float[np.ndarray, "dim dim"], cov_b: Float[np.ndarray, "dim dim"]) -> float:
    product = _factor("cov_a", cov_a).T @ _factor("cov_b", cov_b)
    return float(np.linalg.svd(product, compute_uv=False).sum())


def _factor(name: str, cov: Float[np.ndarray, "dim dim"]) -> Float[np.ndarray, "dim rank"]:
    """F with F F^T = C, one column for each eigenvalue that is larger than the rounding error of a zero."""
    values, vectors = np.linalg.eigh(cov)
    largest = np.abs(values).max()
    if values.min() < -_ROUNDING * largest:
        raise ValueError(f"`{name}` must be positive semi-definite, got the eigenvalue {values.min()}.")
    positive = values > len(cov) * np.finfo(np.float64).eps * largest
    return vectors[:, positive] * np.sqrt(values[positive])
