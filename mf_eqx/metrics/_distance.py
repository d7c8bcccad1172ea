r"""Distances between two samples $a_1 \dots a_n$ and $b_1 \dots b_m$, all points of a sample having equal mass.

In one dimension the optimal plan pairs equal quantiles, so with the quantile functions $F_a^{-1}$ and $F_b^{-1}$

$$W_2^2(a, b) = \int_0^1 \big(F_a^{-1}(q) - F_b^{-1}(q)\big)^2 \, dq.$$

Both are constant between their breakpoints $i/n$ and $j/m$, hence the integral is a finite sum over the pieces of the
merged grid, exact for $n \ne m$ too. The grid depends on $n$ and $m$ alone and is found on the host in integers. The
sliced distance averages $W_2^2$ over random unit directions $\theta$ and takes the root at the end.

The energy distance needs no direction and no optimal plan, only the mean distances between and within the samples. The
maximum mean discrepancy has a kernel in place of the distance. The width of the kernel determines the scale of the
differences that are detected.

None of them is meant as a loss: the derivative of a root at zero makes their gradients NaN where points coincide.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from .._custom_types import as_floats
from .._validate import as_count, check_finite, check_positive, on_host_if_known

# Bounds the temporary of distances between all pairs: 2**20 differences are 4 MiB in float32.
_DIFFERENCES_PER_BLOCK = 2**20
# Of the bandwidth of a kernel: more give a factor that float32 cannot hold.
_MOST_HALVINGS = 63


def check_samples(*, least: int = 1, **samples: Any) -> None:
    """Raises a `ValueError` unless these are samples of at least `least` points with the same number of dimensions."""
    for name, points in samples.items():
        shape = np.shape(points)
        if len(shape) != 2 or shape[0] < least or shape[1] < 1:
            raise ValueError(
                f"`{name}` must have shape (sample, dim) with sample >= {least} and dim >= 1, got shape {shape}."
            )
    (a, first), (b, second) = samples.items()
    if np.shape(first)[1] != np.shape(second)[1]:
        raise ValueError(
            f"`{a}` and `{b}` must have the same dim, got shapes {np.shape(first)} and {np.shape(second)}."
        )


def nan_unless_finite(result: Float[Array, ""], *samples: Float[Array, "..."]) -> Float[Array, ""]:
    """`result`; NaN if the samples are traced by JAX, and their values turn out not to be finite."""
    if all(on_host_if_known(points) is not None for points in samples):
        return result
    finite = [jnp.all(jnp.isfinite(points)) for points in samples]
    return jnp.where(functools.reduce(operator.and_, finite), result, jnp.nan)


def sliced_wasserstein(
    a: Float[Array | np.ndarray, "sample_a dim"],
    b: Float[Array | np.ndarray, "sample_b dim"],
    *,
    projections: int = 128,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    r"""Sliced Wasserstein-2 distance of two samples, by Monte Carlo over directions.

    $$SW_2(a, b) = \Big(\frac{1}{P} \sum_{p=1}^{P} W_2^2(\theta_p \cdot a, \theta_p \cdot b)\Big)^{1/2}$$

    with $\theta_p$ uniform on the unit sphere. The result is the distance: the root of the mean, in the unit of the
    points. Its square is the mean squared $W_2$ (what other codes call the squared sliced distance), and only the
    square is unbiased in the number of directions. Moving a sample by a vector $\delta$ gives
    $SW_2^2 \to |\delta|^2 / \text{dim}$, so values in different dimensions cannot be compared. In one dimension the
    result is $W_2$ itself, whatever the directions.

    **Arguments:**

    - `a`, `b`: the samples, one point per row; the numbers of points may differ.
    - `projections`: the number $P$ of directions. Memory grows as $P$ (sample_a + sample_b).
    - `key`: the key of the directions. Equal keys give equal directions, so compare models with one key.

    **Returns:** the distance, a scalar of at least float32.

    **Raises:** `ValueError` if `a` or `b` is not (sample, dim) with at least one point, if their dims differ, if a
    value is not finite, or if `projections` is no integer >= 1. Under `jax.jit` values are not known: there the
    result is NaN if one is not finite.

    **Reference:** Sliced and Radon Wasserstein Barycenters of Measures, Bonneel, Rabin, Peyré and Pfister, 2015.
    """
    projections = as_count("projections", projections)
    a, b = _checked(a, b)
    directions = _directions(projections, a.shape[1], a.dtype, key=key)
    distance = _root_mean_square(_sorted(_projected(a, directions)), _sorted(_projected(b, directions)))
    return nan_unless_finite(distance, a, b)


def energy_distance(
    a: Float[Array | np.ndarray, "sample_a dim"], b: Float[Array | np.ndarray, "sample_b dim"]
) -> Float[Array, ""]:
    r"""Energy distance of two samples, as a V-statistic and without a root.

    $$D(a, b) = \frac{2}{nm} \sum_{i,j} |a_i - b_j| - \frac{1}{n^2} \sum_{i,i'} |a_i - a_{i'}|
      - \frac{1}{m^2} \sum_{j,j'} |b_j - b_{j'}|$$

    with Euclidean norms. A V-statistic keeps the pairs $i = i'$: $D$ is zero for equal samples and never negative
    beyond rounding, but its mean over finite samples of one distribution is above zero, by
    $(1/n + 1/m) \, \mathbb{E}|X - X'|$. This is the square of what `scipy.stats.energy_distance` returns for
    one-dimensional samples, and has the unit of the points.

    The sums run over blocks of rows: memory stays near that of the samples, never sample_a x sample_b.

    **Arguments:**

    - `a`, `b`: the samples, one point per row; the numbers of points may differ.

    **Returns:** $D(a, b)$, a scalar of at least float32. It is a difference of mean distances, so its absolute error is
    that of the mean distance: values below about 1e-6 of that are rounding in float32.

    **Raises:** `ValueError` if `a` or `b` is not (sample, dim) with at least one point, if their dims differ, or if a
    value is not finite. Under `jax.jit` values are not known: there the result is NaN if one is not finite.

    **Reference:** Energy statistics: A class of statistics based on distances, Székely and Rizzo, 2013.
    """
    a, b = _checked(a, b)
    distance = 2 * _mean_of_pairs(_distance, a, b) - _mean_of_pairs(_distance, a, a) - _mean_of_pairs(_distance, b, b)
    return nan_unless_finite(distance, a, b)


def maximum_mean_discrepancy(
    a: Float[Array | np.ndarray, "sample_a dim"],
    b: Float[Array | np.ndarray, "sample_b dim"],
    *,
    bandwidth: float = 1.0,
    halvings: int = 3,
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy (MMD²) of two samples, as a V-statistic, for a mean of Gaussian kernels.

    $$\mathrm{MMD}^2(a, b) = \overline{k(a, a')} + \overline{k(b, b')} - 2\, \overline{k(a, b)}, \qquad
    k(x, y) = \frac{1}{H + 1} \sum_{i=0}^{H} \exp\Big(-\frac{|x - y|^2}{2 (h / 2^i)^2}\Big)$$

    where bars are means over all pairs, equal indices included: MMD² is zero for equal samples and never negative
    beyond rounding, but its mean over finite samples of one distribution is $(1/n + 1/m)(1 - \mathbb{E}\, k(X, X'))$.

    **Arguments:**

    - `a`, `b`: the samples, one point per row; the numbers of points may differ.
    - `bandwidth`: the largest standard deviation h of a kernel, in the unit of the points; 1 suits data of unit scale.
    - `halvings`: H, how often it is halved; 3 by default: 1, 1/2, 1/4, 1/8.

    **Returns:** MMD², a scalar of at least float32 in [0, 2], without a unit. Below about 1e-6 it is rounding in
    float32.

    **Raises:** `ValueError` if `a` or `b` is not (sample, dim) with at least one point, if their dims differ, if a
    value is not finite, if `bandwidth` is not positive, or if `halvings` is no integer in [0, 63]. Under `jax.jit`
    values are not known: there the result is NaN if one is not finite.

    **Reference:** A Kernel Two-Sample Test, Gretton, Borgwardt, Rasch, Schölkopf and Smola, 2012.
    """
    check_positive("bandwidth", bandwidth)
    if (halvings := as_count("halvings", halvings, 0)) > _MOST_HALVINGS:
        raise ValueError(f"halvings must be at most {_MOST_HALVINGS}, got {halvings}")
    a, b = _checked(a, b)
    a, b = a / bandwidth, b / bandwidth
    kernel = functools.partial(_kernel, halvings)
    discrepancy = _mean_of_pairs(kernel, a, a) + _mean_of_pairs(kernel, b, b) - 2 * _mean_of_pairs(kernel, a, b)
    return nan_unless_finite(discrepancy, a, b)


def _checked(a, b) -> tuple[Float[Array, "sample_a dim"], Float[Array, "sample_b dim"]]:
    """Both samples in one precision, float32 or better."""
    check_samples(a=a, b=b)
    with np.errstate(over="ignore"):  # overflow to infinity is refused below
        a, b = as_floats("`a`", a), as_floats("`b`", b)
    # Generated points may be bfloat16 and the truth float32: they are promoted here, also under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    a, b = a.astype(dtype), b.astype(dtype)
    check_finite("`a`", a)
    check_finite("`b`", b)
    return a, b


def _directions(projections: int, dim: int, dtype, *, key: Key[Array, ""]) -> Float[Array, "projection dim"]:
    normal = jax.random.normal(key, (projections, dim), dtype)
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True)


@jax.jit
def _projected(
    points: Float[Array, "sample dim"], directions: Float[Array, "projection dim"]
) -> Float[Array, "projection sample"]:
    # Accelerators round the factors of a default product to 10 bits or fewer, an error larger than small distances.
    return jnp.matmul(directions, points.T, precision="highest")


def _sorted(values: Float[Array, "projection sample"]) -> Float[Array, "projection sample"]:
    """Each row in order. On a CPU NumPy does it, which needs a tenth of the time of XLA's sort there."""
    on_host = on_host_if_known(values) if jax.default_backend() == "cpu" else None
    return jnp.sort(values) if on_host is None else jnp.asarray(np.sort(on_host))


@jax.jit
def _root_mean_square(
    a: Float[Array, "projection sample_a"], b: Float[Array, "projection sample_b"]
) -> Float[Array, ""]:
    """The root of the mean squared W2, of sorted projections."""
    index_a, index_b, mass = _merged_quantiles(a.shape[1], b.shape[1])
    squares = jnp.asarray(mass, a.dtype) * (a[:, index_a] - b[:, index_b]) ** 2
    return jnp.sqrt(jnp.mean(jnp.sum(squares, axis=1)))


def _merged_quantiles(
    n: int, m: int
) -> tuple[Int[np.ndarray, " piece"], Int[np.ndarray, " piece"], Float[np.ndarray, " piece"]]:
    """The order statistics of either sample on each piece of the merged grid, and the mass of the piece."""
    # In units of 1/(n m) all breakpoints are integers, so equal ones merge exactly and no piece has a rounding width.
    right = np.union1d(m * np.arange(1, n + 1, dtype=np.int64), n * np.arange(1, m + 1, dtype=np.int64))
    left = np.concatenate([np.zeros(1, np.int64), right[:-1]])
    return left // m, left // n, (right - left) / (n * m)


def _distance(difference: Float[Array, "sample dim"]) -> Float[Array, " sample"]:
    return jnp.linalg.norm(difference, axis=1)


def _kernel(halvings: int, difference: Float[Array, "sample dim"]) -> Float[Array, " sample"]:
    half_square = jnp.sum(difference**2, axis=1) / 2
    kernels = (
        jnp.exp(-(4.0**i) * half_square) for i in range(halvings + 1)
    )  # half the bandwidth, 4 times the exponent
    return functools.reduce(operator.add, kernels) / (halvings + 1)


@eqx.filter_jit
def _mean_of_pairs(
    function: Callable[[Float[Array, "sample dim"]], Float[Array, " sample"]],
    a: Float[Array, "sample_a dim"],
    b: Float[Array, "sample_b dim"],
) -> Float[Array, ""]:
    # Differences, not |a|^2 - 2 a.b + |b|^2, which cancels for close points; these determine a small distance.
    def mean_to_all(point: Float[Array, " dim"]) -> Float[Array, ""]:
        return jnp.mean(function(b - point))

    rows = min(a.shape[0], max(1, _DIFFERENCES_PER_BLOCK // b.size))
    return jnp.mean(jax.lax.map(mean_to_all, a, batch_size=rows))
